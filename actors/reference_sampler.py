"""The same sampling distribution with transformers alone: for tests, and for machines without vLLM."""

from __future__ import annotations

import time

import torch
from transformers import DynamicCache

from actors.samples import ImageDecoder, RawSample, build_samples, request_seed
from actors.support_masks import SupportMasks
from vlcot.grammar import ChainState
from vlcot.groups import Group, Prompt, VersionSpan
from vlcot.policy.family import Family
from vlcot.policy.model import VlcotForCausalLM


class ReferenceSampler:
    """Samples groups with a key/value cache, the G chains of a prompt in one batch.

    Distribution, grammar and results are those of :class:`actors.rollout_actor.RolloutActor`; the random
    numbers are not, so equal seeds give other samples.

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
        if temperature <= 0:
            raise ValueError(f"temperature must be positive, got {temperature}")
        self._model = model.eval()
        self._builder = family.builder
        self._decoder = decoder
        self._group_size = group_size
        self._temperature = temperature
        self._max_new_tokens = max_new_tokens
        self._seed = seed
        self._version = version
        self._masks = SupportMasks(self._builder.grammar, model.device)

    def generate(self, prompt: Prompt) -> Group:
        """Sample the G chains of ``prompt``; reproducible from prompt, seed and weights."""
        started = time.perf_counter()
        samples = build_samples(self._builder, self._decoder, self._sample(prompt))
        return Group(prompt, samples, time.perf_counter() - started, "reference")

    @torch.no_grad()
    def _sample(self, prompt: Prompt) -> list[RawSample]:
        device = self._model.device
        generator = torch.Generator(device).manual_seed(request_seed(self._seed, prompt.seed))
        states = [ChainState(self._builder.grammar) for _ in range(self._group_size)]
        ids: list[list[int]] = [[] for _ in states]
        logprobs: list[list[float]] = [[] for _ in states]
        cache = DynamicCache()
        following = torch.from_numpy(prompt.ids).long().to(device).expand(self._group_size, -1)
        for _ in range(self._max_new_tokens):
            hidden = self._model.model(input_ids=following, past_key_values=cache).last_hidden_state[:, -1]
            logits = self._masks.apply(self._model.lm_head(hidden).float(), states) / self._temperature
            log_p = logits.log_softmax(-1)
            chosen = torch.multinomial(log_p.exp(), 1, generator=generator)
            values = log_p.gather(1, chosen).squeeze(1).tolist()
            for row, (state, token) in enumerate(zip(states, chosen.squeeze(1).tolist(), strict=True)):
                if not state.finished:
                    ids[row].append(token)
                    logprobs[row].append(values[row])
                    state.advance(token)
            if all(state.finished for state in states):
                break
            following = chosen
        return [self._raw(*written) for written in zip(states, ids, logprobs, strict=True)]

    def _raw(self, state: ChainState, ids: list[int], logprobs: list[float]) -> RawSample:
        span = VersionSpan(self._version, 0, len(ids))
        return RawSample(ids, logprobs, (span,), "stop" if state.finished else "length")
