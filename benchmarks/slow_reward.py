"""A reward that takes as long as it is told, for ``benchmarks.reward_hiding`` and the client's overhead."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import numpy as np


class SlowReward:
    """Answers 0.5 for every image after ``seconds``, however many groups wait at the same time."""

    def __init__(self, seconds: float = 0.0) -> None:
        self._seconds = seconds

    async def score(self, lr: np.ndarray, images: Sequence[np.ndarray]) -> list[float]:
        await asyncio.sleep(self._seconds)
        return [0.5] * len(images)
