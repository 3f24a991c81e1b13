"""From a group and the servers' answers to a scored group."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from reward_servers.client import RewardClient
from reward_servers.contract import Detection, Judgement
from vlcot import rewards
from vlcot.groups import Failed, Group, Sample, Score, Scored, ScoredGroup


@dataclass(frozen=True)
class MinViableGroup:
    """Failure policy: a group is trained if enough of its samples have a reward, else it is dropped.

    ``floor`` is a share of the group size; an advantage against a few siblings has a biased baseline.
    """

    floor: float = 0.75

    def viable(self, valid: int, group_size: int) -> bool:
        """Whether ``valid`` of ``group_size`` samples are enough."""
        return valid >= max(2, math.ceil(self.floor * group_size))


class Scorer:
    """Asks the servers and computes the rewards of a group.

    Args:
        client: reward servers.
        weights: of the four components in the total.
        expert: of the visual expert's scores.
    """

    def __init__(self, client: RewardClient, weights: rewards.RewardWeights, expert: rewards.ExpertWeights) -> None:
        self._client = client
        self._weights = weights
        self._expert = expert

    def find_objects(self, lr_image: np.ndarray) -> asyncio.Task[Detection | Failed]:
        """Ask for the main objects; they depend on the LR image only, so this is done at admission."""
        return asyncio.create_task(self._client.objects(lr_image))

    async def score(self, group: Group, objects: asyncio.Task[Detection | Failed]) -> ScoredGroup:
        """All four rewards of every sample."""
        started = time.monotonic()
        detection = await objects
        detected = time.monotonic()
        judged = await self._judge(group)
        finished = time.monotonic()
        scores = tuple(
            self._sample_scores(sample, group.prompt.degradation, detection, generation)
            for sample, generation in zip(group.samples, judged, strict=True)
        )
        totals = [rewards.total_reward(s, self._weights) for s in scores]
        return ScoredGroup(
            group=group,
            scores=scores,
            totals=np.array([math.nan if t is None else t for t in totals], dtype=np.float64),
            valid=np.array([t is not None for t in totals]),
            objects=() if isinstance(detection, Failed) else detection.main,
            reward_s={"grounded_sam": detected - started, "qwen_vl": finished - detected},
        )

    def _sample_scores(
        self, sample: Sample, truth: str, detection: Detection | Failed, generation: Score
    ) -> Mapping[str, Score]:
        understanding: Score
        if isinstance(detection, Failed):
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
        """Generation score per sample; a chain without a final image has nothing to judge and scores 0."""
        finals = [sample.images[-1] for sample in group.samples]
        shown = [image for image in finals if image is not None]
        answer: Sequence[Judgement] | Failed = []
        if shown:
            answer = await self._client.judge(group.prompt.lr_image, shown, group.prompt.seed)
        if isinstance(answer, Failed):
            return [Scored(0.0, {"reason": "no final image"}) if f is None else answer for f in finals]
        judgements = iter(answer)
        return [
            Scored(0.0, {"reason": "no final image"})
            if image is None
            else rewards.generation_reward(vars(next(judgements)), self._expert)
            for image in finals
        ]
