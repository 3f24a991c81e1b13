"""The sampler on transformers alone: for guidance, for machines without vLLM, and to test vLLM against.

All chains of a call are one batch. A guided chain that is inside an image has a second row, its twin, which has read
the ids of that image and nothing before them; both rows get the same new id in the same forward pass. So the two can
never be apart, which vLLM's scheduler does not promise (docs/decoding.md).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np
import torch

from actors.decoding import Decoding
from actors.paired_rows import Choice, PairedRows, Row
from actors.samples import ImageDecoder, RawSample, build_samples, request_seed
from vlcot.groups import Group, Prompt, VersionSpan
from vlcot.policy.family import Family
from vlcot.policy.model import VlcotForCausalLM

Watch = Callable[[int, int], None]
"""Told the row of a chain in the batch and each of its ids as soon as it is sampled; may raise to end the sampling."""


class ReferenceSampler:
    """Samples groups with a key/value cache.

    Distribution, grammar and results are those of :class:`actors.rollout_actor.RolloutActor`; the random
    numbers are not, so equal seeds give other samples. A sample depends on its prompt, its seed and the weights; what
    else is in the batch changes its logits by rounding only.

    Args:
        model: the policy; its dtype and device are used as they are.
        family: vocabulary and layout.
        decoder: of images.
        group_size, temperature, max_new_tokens: as in :class:`actors.spec.RolloutSpec`.
        seed: of the run.
        version: weight version that the samples are stamped with.
    """

    def __init__(
        self,
        model: VlcotForCausalLM,
        family: Family,
        decoder: ImageDecoder,
        *,
        group_size: int,
        temperature: float,
        max_new_tokens: int,
        seed: int = 0,
        version: int = 0,
    ) -> None:
        self._model = model.eval()
        self._builder = family.builder
        self._decoder = decoder
        self._group_size = group_size
        self._decoding = Decoding(temperature=temperature)
        self._max_new_tokens = max_new_tokens
        self._seed = seed
        self._version = version
        self._choice = Choice(model, self._builder.grammar)

    def generate(self, prompt: Prompt, decoding: Decoding | None = None, watch: Watch | None = None) -> Group:
        """Sample the G chains of ``prompt``, by default at the sampler's temperature and no more."""
        return self.generate_batch([prompt], [decoding], watch)[0]

    def generate_batch(
        self, prompts: Sequence[Prompt], decodings: Sequence[Decoding | None], watch: Watch | None = None
    ) -> list[Group]:
        """Sample the G chains of each prompt, all in one batch; guided and plain ones may be mixed.

        Memory for the longest chain that each prompt may have is taken at the start, for a guided chain also for the
        ids of the largest image.

        Args:
            decodings: one for each prompt; None is the sampler's temperature and no more.
            watch: follows the chains; they are numbered prompt by prompt.

        Returns:
            A group for each prompt; ``generation_s`` is the time of the whole batch.

        Raises:
            ValueError: a prompt leaves no room for ``max_new_tokens``, or there are more or fewer decodings.
        """
        started = time.perf_counter()
        positions = self._model.config.max_position_embeddings
        for prompt in prompts:
            if len(prompt.ids) + self._max_new_tokens > positions:
                raise ValueError(
                    f"prompt {prompt.row_id} of {len(prompt.ids)} ids and {self._max_new_tokens} new ones are more "
                    f"than the policy's {positions} positions"
                )
        rows = [
            Row(self._builder.grammar, decoding or self._decoding, seed + index, self._max_new_tokens)
            for prompt, decoding in zip(prompts, decodings, strict=True)
            for seed in [request_seed(self._seed, prompt.seed)]
            for index in range(self._group_size)
        ]
        if rows:
            self._write(rows, [prompt.ids for prompt in prompts], watch)
        seconds = time.perf_counter() - started
        samples = build_samples(self._builder, self._decoder, [self._raw(row) for row in rows])
        size = self._group_size
        return [
            Group(prompt, samples[i * size : (i + 1) * size], seconds, "reference") for i, prompt in enumerate(prompts)
        ]

    @torch.inference_mode()
    def _write(self, rows: list[Row], prompts: Sequence[np.ndarray], watch: Watch | None) -> None:
        grammar, most = self._builder.grammar, self._max_new_tokens
        batch = PairedRows(self._model, grammar, rows, prompts, self._group_size, most)
        for written in range(1, most + 1):
            self._choice.make(batch.live, batch.hidden)
            if watch is not None:
                for number, row in enumerate(rows):
                    if len(row.ids) == written:  # else it ended before
                        watch(number, row.ids[-1])
            if written == most or all(row.state.finished for row in batch.live):
                break
            batch.read()

    def _raw(self, row: Row) -> RawSample:
        span = VersionSpan(self._version, 0, len(row.ids))
        return RawSample(row.ids, row.logprobs, (span,), "stop" if row.state.finished else "length")
