"""From sampled ids to :class:`vlcot.groups.Sample`: supports, parsed chain, decoded images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from vlcot.grammar import Support
from vlcot.groups import Sample, VersionSpan
from vlcot.sequence import ParsedChain, SequenceBuilder


class ImageDecoder(Protocol):
    """The part of ``vlcot.tokenizer.image.ImageTokenizer`` that a sampler needs."""

    def decode(self, codes: np.ndarray) -> torch.Tensor:
        """int64 codes [B, h, w] -> uint8 pixels [B, H, W, 3]."""


@dataclass(frozen=True, eq=False)
class RawSample:
    """What a sampler wrote: int ids [T], float log-probs [T], version spans, ``stop`` or ``length``."""

    ids: Sequence[int]
    logprobs: Sequence[float]
    versions: tuple[VersionSpan, ...]
    finish_reason: str


def request_seed(run_seed: int, prompt_seed: int) -> int:
    """Seed of a rollout, below 2**62. Sample ``i`` uses this plus ``i``.

    Hashed, so that prompts with neighbouring seeds do not share the noise of their samples; the actor has
    no part in it, so another actor writes the same group.
    """
    return int(np.random.SeedSequence([run_seed, prompt_seed]).generate_state(1, np.uint64)[0] >> 2)


def build_samples(builder: SequenceBuilder, decoder: ImageDecoder, raw: Sequence[RawSample]) -> tuple[Sample, ...]:
    """Parse the chains and decode their images, all of one size in one batch.

    Raises:
        ValueError: an id outside of the grammar, or log-probs or version spans that do not cover the ids:
            the sampler is wrong.
    """
    chains = [builder.parse(r.ids) for r in raw]
    images = _decode_images(decoder, chains)
    return tuple(_sample(builder, r, chain, own) for r, chain, own in zip(raw, chains, images, strict=True))


def _sample(
    builder: SequenceBuilder, raw: RawSample, chain: ParsedChain, images: tuple[np.ndarray | None, ...]
) -> Sample:
    supports = builder.grammar.supports(raw.ids)
    logprobs = np.array(raw.logprobs, dtype=np.float32)
    ends = [0, *(span.end for span in raw.versions)]
    if len(logprobs) != len(raw.ids) or ends[-1] != len(raw.ids):
        raise ValueError(f"{len(raw.ids)} ids came with {len(logprobs)} log-probs and versions up to {ends[-1]}")
    if any(span.start != end for span, end in zip(raw.versions, ends, strict=False)):
        raise ValueError(f"version spans do not follow each other: {raw.versions}")
    logprobs[supports == Support.FORCED] = 0.0
    ids = np.array(raw.ids, dtype=np.int32)
    return Sample(ids, logprobs, supports, raw.versions, raw.finish_reason, chain, images)


def _decode_images(decoder: ImageDecoder, chains: Sequence[ParsedChain]) -> list[tuple[np.ndarray | None, ...]]:
    count = len(chains[0].images) if chains else 0
    decoded: list[list[np.ndarray | None]] = [[None] * count for _ in chains]
    for step in range(count):
        codes = {i: c for i, chain in enumerate(chains) if (c := chain.images[step]) is not None}
        if codes:
            pixels = decoder.decode(np.stack(list(codes.values()))).cpu().numpy()
            for owner, image in zip(codes, pixels, strict=True):
                decoded[owner][step] = image
    return [tuple(own) for own in decoded]
