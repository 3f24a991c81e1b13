"""Who judges final images: the visual expert, or the metrics that the paper's ablations put in its place."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

import numpy as np

from reward_servers.client import IQA, QWEN_VL, RewardClient
from vlcot import rewards
from vlcot.groups import Failed, Prompt, Score, Scored


class Expert(Protocol):
    """Gives the generation reward. ``server`` is whom it asks."""

    server: str

    async def judge(self, prompt: Prompt, images: Sequence[np.ndarray]) -> Sequence[Scored] | Failed:
        """The reward of each final image uint8 [H, W, 3] (at least one) of the prompt's group, in their order."""


class VisualExpert:
    """Qwen2.5-VL sees the group beside its LR image.

    Args:
        weights: of its three scores.
    """

    server = QWEN_VL

    def __init__(self, client: RewardClient, weights: rewards.ExpertWeights) -> None:
        self._client = client
        self._weights = weights

    async def judge(self, prompt: Prompt, images: Sequence[np.ndarray]) -> Sequence[Scored] | Failed:
        """As :meth:`Expert.judge`."""
        answer = await self._client.judge(prompt.lr_image, images, prompt.seed)
        if isinstance(answer, Failed):
            return answer
        return [rewards.generation_reward(vars(judgement), self._weights) for judgement in answer]


class MetricExpert:
    """Image-quality metrics.

    Args:
        metrics: that the server is to answer, no more and no fewer: with others it would be another reward.
        with_truth: compare with the ground truth.
    """

    server = IQA

    def __init__(self, client: RewardClient, metrics: Sequence[str], with_truth: bool) -> None:
        self._client = client
        self._metrics = frozenset(metrics)
        self._with_truth = with_truth

    async def judge(self, prompt: Prompt, images: Sequence[np.ndarray]) -> Sequence[Scored] | Failed:
        """As :meth:`Expert.judge`."""
        answer = await self._client.measure(images, prompt.truth if self._with_truth else None)
        if isinstance(answer, Failed):
            return answer
        if answer.values.keys() != self._metrics:
            return Failed(f"iqa measured {_listed(answer.values)}, this run's reward is of {_listed(self._metrics)}")
        return [rewards.metrics_reward(_of_image(answer.values, index)) for index in range(len(images))]


class CustomReward:
    """A reward of the user's own (``reward.extra``), asked as an expert is."""

    def __init__(self, client: RewardClient, name: str) -> None:
        self._client = client
        self.server = name

    async def judge(self, prompt: Prompt, images: Sequence[np.ndarray]) -> Sequence[Scored] | Failed:
        """As :meth:`Expert.judge`."""
        answer = await self._client.score(self.server, prompt.lr_image, images)
        return answer if isinstance(answer, Failed) else [Scored(value) for value in answer]


async def generation_scores(expert: Expert, prompt: Prompt, finals: Sequence[np.ndarray | None]) -> Sequence[Score]:
    """What ``expert`` says of each chain; one without a final image has nothing to judge and scores 0."""
    shown = [image for image in finals if image is not None]
    answer = await expert.judge(prompt, shown) if shown else []
    if isinstance(answer, Failed):
        return [_nothing() if image is None else answer for image in finals]
    found = iter(answer)
    return [_nothing() if image is None else next(found) for image in finals]


def _nothing() -> Scored:
    return Scored(0.0, {"reason": "no final image"})


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))


def _of_image(values: Mapping[str, tuple[float, ...]], index: int) -> dict[str, float]:
    return {name: of_images[index] for name, of_images in values.items()}
