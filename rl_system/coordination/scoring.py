"""From a group and the servers' answers to a scored group."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Mapping, Sequence

import numpy as np

from reward_servers.client import GROUNDED_SAM, RewardClient
from reward_servers.contract import Detection
from rl_system.coordination.experts import Expert, generation_scores
from vlcot import rewards
from vlcot.groups import Absent, Failed, Group, Sample, Score, ScoredGroup

SWITCHED_OFF = Absent("switched off: its weight is 0")


class Scorer:
    """Asks the servers and computes the rewards of a group. A reward of weight 0 that needs a server is not asked for.

    Args:
        client: reward servers.
        weights: of the four components in the total.
        expert: who judges final images.
    """

    def __init__(self, client: RewardClient, weights: rewards.RewardWeights, expert: Expert) -> None:
        self._client = client
        self._weights = weights
        self._expert = expert

    def left_alone(self) -> tuple[str, ...]:
        """Servers that failed again and again and are not asked for a while."""
        return self._client.left_alone()

    def find_objects(self, lr_image: np.ndarray) -> asyncio.Task[Detection | Failed]:
        """Ask for the main objects; they depend on the LR image only, so this is done at admission."""
        return asyncio.create_task(self._detect(lr_image))

    async def score(self, group: Group, objects: asyncio.Task[Detection | Failed]) -> ScoredGroup:
        """All four rewards of every sample."""
        started = time.monotonic()
        detection = await objects
        detected = time.monotonic()
        generation = await self._judge(group)
        finished = time.monotonic()
        scores = tuple(
            self._sample_scores(sample, group.prompt.degradation, detection, judged)
            for sample, judged in zip(group.samples, generation, strict=True)
        )
        totals = [rewards.total_reward(s, self._weights) for s in scores]
        waited = {GROUNDED_SAM: detected - started, self._expert.server: finished - detected}
        used = {GROUNDED_SAM: self._weights.understanding > 0, self._expert.server: self._weights.generation > 0}
        return ScoredGroup(
            group=group,
            scores=scores,
            totals=np.array([math.nan if t is None else t for t in totals], dtype=np.float64),
            valid=np.array([t is not None for t in totals]),
            objects=() if isinstance(detection, Failed) else detection.main,
            reward_s={server: seconds for server, seconds in waited.items() if used[server]},
        )

    async def _detect(self, lr_image: np.ndarray) -> Detection | Failed:
        return await self._client.objects(lr_image) if self._weights.understanding > 0 else Detection((), ())

    def _sample_scores(
        self, sample: Sample, truth: str, detection: Detection | Failed, generation: Score
    ) -> Mapping[str, Score]:
        understanding: Score
        if self._weights.understanding == 0:
            understanding = SWITCHED_OFF
        elif isinstance(detection, Failed):
            understanding = detection
        else:
            understanding = rewards.understanding_reward(sample.chain.coarse, detection.main)
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
        return await generation_scores(self._expert, group.prompt, [s.images[-1] for s in group.samples])
