"""What travels between the processes of a run. Everything here is frozen and picklable."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vlcot.sequence import ParsedChain


@dataclass(frozen=True)
class Scored:
    """A reward in [0, 1] with what it rests on."""

    value: float
    detail: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 0.0 <= self.value <= 1.0:  # also refuses NaN
            raise ValueError(f"a reward must lie in [0, 1], got {self.value}")


@dataclass(frozen=True)
class Absent:
    """The component does not apply to this image; it enters no sum."""

    reason: str


@dataclass(frozen=True)
class Failed:
    """The reward could not be had; the sample must not be trained on."""

    reason: str


Score = Scored | Absent | Failed


@dataclass(frozen=True, eq=False)
class Prompt:
    """One LR image to restore G times.

    Attributes:
        group_id: unique in the run; groups are told apart by it, never by the prompt's text.
        row_id: row of the data set.
        seed: of the rollout; sample ``i`` uses ``seed`` and ``i``.
        ids: int32 [P] prompt ids.
        lr_image: uint8 [H, W, 3] RGB, as it was taken (before up-scaling for the policy).
        degradation: true description of the degradation.
        truth: uint8 [S, S, 3] RGB ground truth for metrics that compare with it, None where there is none; only the
            scorer may look at it.
        objects: names of the main objects where the data name them, lower case; None where they do not.
    """

    group_id: str
    row_id: str
    seed: int
    ids: np.ndarray
    lr_image: np.ndarray
    degradation: str
    truth: np.ndarray | None = None
    objects: tuple[str, ...] | None = None


@dataclass(frozen=True)
class VersionSpan:
    """Weights of version ``version`` sampled the tokens ``start`` (inclusive) to ``end`` (exclusive)."""

    version: int
    start: int
    end: int


@dataclass(frozen=True, eq=False)
class Sample:
    """One chain.

    Attributes:
        ids: int32 [T] sampled ids, the end of the turn included where it was reached.
        logprobs: float32 [T], natural log, under the exact sampling distribution (temperature, grammar);
            0 at forced positions.
        supports: uint8 [T], :class:`vlcot.grammar.Support`.
        versions: spans that cover [0, T) in order.
        finish_reason: ``stop`` (end of turn) or ``length``.
        chain: what was written.
        images: uint8 [h, w, 3] RGB of the coarse, middle and final image, None where the chain has none.
    """

    ids: np.ndarray
    logprobs: np.ndarray
    supports: np.ndarray
    versions: tuple[VersionSpan, ...]
    finish_reason: str
    chain: ParsedChain
    images: tuple[np.ndarray | None, ...]

    @property
    def oldest_version(self) -> int:
        """Lowest weight version that sampled a token."""
        return min(span.version for span in self.versions)


@dataclass(frozen=True, eq=False)
class Group:
    """The G samples of one prompt.

    Attributes:
        generation_s: wall time of the rollout in seconds.
        actor: name of the one that sampled it.
        discarded_tokens: sampled by weights that were replaced in mid-chain, thrown away and sampled again.
    """

    prompt: Prompt
    samples: tuple[Sample, ...]
    generation_s: float
    actor: str
    discarded_tokens: int = 0


@dataclass(frozen=True, eq=False)
class ScoredGroup:
    """A group with its rewards.

    Attributes:
        scores: per sample, component name -> score.
        totals: float64 [G]; NaN where a component failed (never read: see ``valid``).
        valid: bool [G]; samples that may be trained on.
        objects: main objects found in the LR image.
        reward_s: wall seconds spent waiting for each reward server.
    """

    group: Group
    scores: tuple[Mapping[str, Score], ...]
    totals: np.ndarray
    valid: np.ndarray
    objects: tuple[str, ...]
    reward_s: Mapping[str, float]
