"""Per-step metrics of the whole pipeline, with the names of docs/metrics.md."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from vlcot.groups import Failed, Scored, ScoredGroup
from vlcot.rewards import component_names

Interval = tuple[float, float]


class PipelineMeter:
    """Collects what happened between two learner steps. Times are epoch seconds."""

    def __init__(self) -> None:
        self._step_began = time.time()
        self._generations: list[Interval] = []
        self._generating: dict[str, float] = {}
        self._rewards: list[Interval] = []
        self._failures: Counter[str] = Counter()
        self._tokens = self._discarded = self._images = self._asked = 0
        self.max_staleness = 0.0

    def generating(self, group_id: str) -> None:
        """One group was given to the actors."""
        self._generating[group_id] = time.time()

    def generation(self, group_id: str, start: float, end: float) -> None:
        """One group was generated."""
        self._generating.pop(group_id, None)
        self._generations.append((start, end))

    def reward(self, start: float, end: float) -> None:
        """One group was scored."""
        self._rewards.append((start, end))

    def group(self, scored: ScoredGroup) -> None:
        """Count a scored group's tokens, images and failed rewards."""
        self._discarded += scored.group.discarded_tokens
        for sample, scores in zip(scored.group.samples, scored.scores, strict=True):
            self._tokens += len(sample.ids)
            self._images += sum(image is not None for image in sample.images)
            self._failures.update(name for name, score in scores.items() if isinstance(score, Failed))
            self._asked += sum(isinstance(score, Failed | Scored) for score in scores.values())

    def step(self, learner: Mapping[str, float], groups: Sequence[ScoredGroup]) -> dict[str, float]:
        """Metrics of the step that has just been pushed, and a fresh start for the next."""
        now = time.time()
        wall = max(now - self._step_began, 1e-9)
        generations = self._generations + [(start, now) for start in self._generating.values()]
        metrics = dict(learner)
        metrics |= reward_means(groups)
        metrics |= {
            "time/step": wall,
            "time/generate": float(np.mean([g.group.generation_s for g in groups])),
            "time/reward": float(np.mean([sum(g.reward_s.values()) for g in groups])),
            "idle/actors": 1.0 - covered((self._step_began, now), generations) / wall,
            "idle/learner": min(1.0, learner.get("time/wait_batch", 0.0) / wall),
            "reward_hidden": hidden_share(self._rewards, generations),
            "throughput/sampled_tokens_per_s": self._tokens / wall,
            "throughput/discarded_tokens_per_s": self._discarded / wall,
            "throughput/images_per_s": self._images / wall,
        }
        metrics |= {f"failures/{name}": float(self._failures[name]) for name in component_names(self._failures)}
        metrics["failures/rate"] = self._failures.total() / self._asked if self._asked else 0.0
        self.max_staleness = max(self.max_staleness, metrics.get("staleness/max", 0.0))
        self._step_began = now
        self._generations = [i for i in self._generations if i[1] > now - 60]
        self._rewards.clear()
        self._failures.clear()
        self._tokens = self._discarded = self._images = self._asked = 0
        return metrics


def reward_means(groups: Sequence[ScoredGroup]) -> dict[str, float]:
    """``reward/total`` over valid samples and ``reward/NAME`` over the samples that have the component."""
    totals = np.concatenate([g.totals[g.valid] for g in groups])
    means = {"reward/total": float(totals.mean())} if totals.size else {}
    for name in component_names(name for g in groups for scores in g.scores for name in scores):
        values = [score.value for g in groups for s in g.scores if isinstance(score := s.get(name), Scored)]
        if values:
            means[f"reward/{name}"] = float(np.mean(values))
    return means


def covered(window: Interval, intervals: Sequence[Interval]) -> float:
    """Seconds of ``window`` in which at least one of ``intervals`` is open."""
    begin, end = window
    total, reached = 0.0, begin
    for start, stop in sorted(intervals):
        start, stop = max(start, reached), min(stop, end)
        if stop > start:
            total += stop - start
            reached = stop
    return total


def hidden_share(rewards: Sequence[Interval], generations: Sequence[Interval]) -> float:
    """Share of the time spent on rewards during which generation went on; 1 if no time was spent."""
    spent = sum(end - start for start, end in rewards)
    return sum(covered(interval, generations) for interval in rewards) / spent if spent > 0 else 1.0
