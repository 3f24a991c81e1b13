"""What becomes of a group in which a reward failed.

Whatever a policy says, the sample whose reward failed is not trained on (``ScoredGroup.valid``).
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from vlcot.groups import Failed, ScoredGroup


class Verdict(Enum):
    """What to do with a scored group."""

    TRAIN = "train"
    SCORE_AGAIN = "score again"
    DROP = "drop"


class RewardFailure(RuntimeError):
    """A reward failed in a run that tolerates none; the message names the group and the reasons."""


class FailurePolicy(Protocol):
    """Decides over every group once its rewards are there."""

    def verdict(self, group: ScoredGroup, scorings: int) -> Verdict:
        """What to do after ``scorings`` (at least 1) scorings of the group."""


@dataclass(frozen=True)
class FailFast:
    """The run ends at the first failed reward: for experiments in which every number must be there."""

    def verdict(self, group: ScoredGroup, scorings: int) -> Verdict:
        """TRAIN. Raises RewardFailure if a sample has no reward."""
        if not group.valid.all():
            raise RewardFailure(f"group {group.group.prompt.group_id}: {failure_reasons(group)}")
        return Verdict.TRAIN


@dataclass(frozen=True)
class RetryThenDrop:
    """A group with a failed reward is scored again, up to ``retries`` times, then dropped whole."""

    retries: int = 1

    def __post_init__(self) -> None:
        if self.retries < 0:
            raise ValueError(f"retries must not be negative, got {self.retries}")

    def verdict(self, group: ScoredGroup, scorings: int) -> Verdict:
        """As the class says."""
        if group.valid.all():
            return Verdict.TRAIN
        return Verdict.SCORE_AGAIN if scorings <= self.retries else Verdict.DROP


@dataclass(frozen=True)
class MinViableGroup:
    """A group is trained if enough of its samples have a reward, else it is dropped.

    ``floor`` is a share of the group size; an advantage against a few siblings has a biased baseline.
    """

    floor: float = 0.75

    def __post_init__(self) -> None:
        if not 0.0 <= self.floor <= 1.0:
            raise ValueError(f"floor must lie in [0, 1], got {self.floor:g}")

    def verdict(self, group: ScoredGroup, scorings: int) -> Verdict:
        """As the class says; two samples are the least that can be compared."""
        enough = max(2, math.ceil(self.floor * len(group.valid)))
        return Verdict.TRAIN if int(group.valid.sum()) >= enough else Verdict.DROP


def failure_reasons(group: ScoredGroup) -> str:
    """How many samples have no reward and why, each reason once with its count; empty if all have one."""
    missing = len(group.valid) - int(group.valid.sum())
    if not missing:
        return ""
    reasons = Counter(
        f"{name}: {score.reason}"
        for scores in group.scores
        for name, score in scores.items()
        if isinstance(score, Failed)
    )
    listed = "; ".join(f"{reason} ({count})" for reason, count in reasons.most_common())
    return f"{missing} of {len(group.valid)} samples have no reward: {listed}"
