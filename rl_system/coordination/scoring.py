"""From a group and the servers' answers to a scored group."""

from __future__ import annotations

import asyncio
import math
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import numpy as np

from rl_system.coordination.experts import Expert, generation_scores
from rl_system.coordination.objects import ObjectSource
from vlcot import rewards
from vlcot.groups import Absent, Failed, Group, Prompt, Sample, Score, ScoredGroup

Objects: TypeAlias = "asyncio.Task[tuple[str, ...] | Failed]"
"""Main objects of an LR image that were asked for."""

SWITCHED_OFF = Absent("switched off: its weight is 0")


class Scorer:
    """Asks the servers and computes the rewards of a group. A reward of weight 0 that needs a server is not asked for.

    Args:
        weights: of the four components in the total, and of ``extra``.
        objects: who names main objects.
        expert: who judges final images.
        extra: who gives further rewards, by their names; each has a weight.
        left_alone: servers that failed again and again and are not asked for a while.
    """

    def __init__(
        self,
        weights: rewards.RewardWeights,
        objects: ObjectSource,
        expert: Expert,
        extra: Mapping[str, Expert],
        left_alone: Callable[[], tuple[str, ...]],
    ) -> None:
        self._weights = weights
        self._objects = objects
        self._expert = expert
        self._extra = dict(extra)
        self.left_alone = left_alone

    def find_objects(self, prompt: Prompt) -> Objects:
        """Ask for the main objects; they depend on the LR image only, so this is done at admission."""
        return asyncio.create_task(self._find(prompt))

    async def score(self, group: Group, objects: Objects) -> ScoredGroup:
        """All four rewards of every sample."""
        started = time.monotonic()
        main = await objects
        found = time.monotonic()
        generation, *further = await asyncio.gather(
            self._judge(group), *(self._ask(expert, group) for expert in self._extra.values())
        )
        finished = time.monotonic()
        scores = tuple(
            {
                **self._sample_scores(sample, group.prompt.degradation, main, generation[i]),
                **{name: of_samples[i] for name, of_samples in zip(self._extra, further, strict=True)},
            }
            for i, sample in enumerate(group.samples)
        )
        totals = [rewards.total_reward(s, self._weights) for s in scores]
        return ScoredGroup(
            group=group,
            scores=scores,
            totals=np.array([math.nan if t is None else t for t in totals], dtype=np.float64),
            valid=np.array([t is not None for t in totals]),
            objects=() if isinstance(main, Failed) else main,
            reward_s=self._waited(found - started, finished - found),
        )

    async def _find(self, prompt: Prompt) -> tuple[str, ...] | Failed:
        return await self._objects.main_objects(prompt) if self._weights.understanding > 0 else ()

    def _waited(self, objects_s: float, expert_s: float) -> dict[str, float]:
        """Seconds by server, of those that were asked."""
        waited: defaultdict[str, float] = defaultdict(float)
        if self._objects.server is not None and self._weights.understanding > 0:
            waited[self._objects.server] += objects_s
        if self._weights.generation > 0:
            waited[self._expert.server] += expert_s
        return dict(waited)

    def _sample_scores(
        self, sample: Sample, truth: str, main: tuple[str, ...] | Failed, generation: Score
    ) -> Mapping[str, Score]:
        understanding: Score
        if self._weights.understanding == 0:
            understanding = SWITCHED_OFF
        elif isinstance(main, Failed):
            understanding = main
        else:
            understanding = rewards.understanding_reward(sample.chain.coarse, main)
        return {
            "format": rewards.format_reward(sample.chain),
            "degradation": rewards.degradation_reward(sample.chain, truth),
            "understanding": understanding,
            "generation": generation,
        }

    async def _judge(self, group: Group) -> Sequence[Score]:
        """Generation score per sample."""
        if self._weights.generation == 0:
            return [SWITCHED_OFF] * len(group.samples)
        return await self._ask(self._expert, group)

    @staticmethod
    async def _ask(expert: Expert, group: Group) -> Sequence[Score]:
        return await generation_scores(expert, group.prompt, [sample.images[-1] for sample in group.samples])
