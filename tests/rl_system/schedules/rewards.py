"""Reward servers that fail, and what the rewards of every sample are when they do not."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from reward_servers.contract import DetectedObject, Detection, Judgement
from tests.rl_system.runs.synthetic import chain
from tests.rl_system.schedules.schedule import Hang, Schedule
from vlcot.groups import Failed, Prompt, Scored, ScoredGroup
from vlcot.sequence import ParsedChain

TRUTH = (
    "[medium blur, heavy downscale, light gaussian noise, heavy compression; "
    "no blur, upscale, medium poisson noise, light compression]"
)
CHAINS = (
    chain((TRUTH, "a cat", "a cat", "a cat")),
    chain((None, "a cup", None, None), ("incomplete",)),
    chain((TRUTH, "a cup", None, None), ("incomplete",)),
)
"""Of a sample by its place in the group: format 1, 0, 0; degradation 1, 0, 1; names the cat, does not, does not."""


def prompt(row: int) -> Prompt:
    """The prompt of a data row; its LR image says which row it is."""
    image = np.array([[[row % 256, row // 256, 0]]], np.uint8)
    return Prompt(f"group-{row}", f"row-{row}", row, np.zeros(2, np.int32), image, TRUTH)


def row_of(asked: Prompt | np.ndarray) -> int:
    image = asked.lr_image if isinstance(asked, Prompt) else asked
    return int(image[0, 0, 0]) + 256 * int(image[0, 0, 1])


def sample_chain(place: int) -> ParsedChain:
    return CHAINS[place % len(CHAINS)]


def final_image(row: int, place: int) -> np.ndarray | None:
    """uint8 [1, 1, 3] that says whose it is; None where the chain has none."""
    return np.array([[[row % 256, row // 256, place]]], np.uint8) if has_final(row, place) else None


def has_final(row: int, place: int) -> bool:
    return (row + place) % 2 != 0


def quality(row: int, place: int) -> float:
    """The visual expert's true score, 1 to 10; some groups have equal scores."""
    return 5.0 if row % 5 == 4 else 1.0 + (row * 7 + place * 3) % 10


def true_rewards(row: int, place: int) -> dict[str, float]:
    """By component, without those that are absent, from the definitions above."""
    kind = place % len(CHAINS)
    rewards = {
        "format": 1.0 if kind == 0 else 0.0,
        "degradation": 0.0 if kind == 1 else 1.0,
        "generation": quality(row, place) / 10 if has_final(row, place) else 0.0,
    }
    if has_objects(row):
        rewards["understanding"] = 1.0 if kind == 0 else 0.0
    return rewards


def has_objects(row: int) -> bool:
    return row % 4 != 3


def check_scores(group: ScoredGroup, failed_rows: set[int]) -> np.ndarray:
    """bool [G]: samples all of whose rewards were had. Every reward that was is the true one (I3)."""
    row = row_of(group.group.prompt)
    known = []
    for place, scores in enumerate(group.scores):
        true = true_rewards(row, place)
        for name, score in scores.items():
            if isinstance(score, Scored):
                assert math.isclose(score.value, true[name]), f"row {row}, sample {place}: {name} was made up"
            elif isinstance(score, Failed):
                failed = row in failed_rows or "left alone" in score.reason
                assert failed and score.reason, f"row {row}, sample {place}: {name} did not fail"
            else:
                assert name not in true, f"row {row}, sample {place}: {name} is not absent"
        known.append(not any(isinstance(score, Failed) for score in scores.values()))
    return np.array(known)


class Servers:
    """A :class:`reward_servers.transports.Transport` to simulated servers.

    Args:
        failed_rows: gets the rows of which a request got no answer.
    """

    def __init__(self, schedule: Schedule, chance: Any, failed_rows: set[int]) -> None:
        self._schedule = schedule
        self._chance = chance
        self._failed_rows = failed_rows

    async def call(self, server: str, method: str, arguments: Mapping[str, Any]) -> Any:
        row = row_of(arguments["image"] if method == "objects" else arguments["lr"])
        try:
            return await self._answer(method, row, arguments)
        except BaseException:  # a deadline cancels the call
            self._failed_rows.add(row)
            raise

    async def _answer(self, method: str, row: int, arguments: Mapping[str, Any]) -> Any:
        now = asyncio.get_running_loop().time()
        if self._schedule.hang in (Hang.SERVERS, Hang.PATIENT_SERVERS) and now >= self._schedule.hang_at:
            await asyncio.Event().wait()
        await asyncio.sleep(self._chance.uniform(0, self._schedule.pace.score))
        now = asyncio.get_running_loop().time()
        if any(begin <= now < begin + length for begin, length in self._schedule.outages):
            raise ConnectionError("the replica died")
        never = self._schedule.undetected if method == "objects" else self._schedule.unjudged
        if row in never or self._chance.random() < self._schedule.failure_rate:
            raise ConnectionError("connection reset")
        if method == "objects":
            return _detection(row)
        places = [int(image[0, 0, 2]) for image in arguments["images"]]
        return [Judgement(*[quality(row, place)] * 3) for place in places]

    async def close(self) -> None:
        pass


def _detection(row: int) -> Detection:
    cat = DetectedObject("cat", 0.9, (0.0, 0.0, 1.0, 1.0), 0.5)
    return Detection((cat,), ("cat",)) if has_objects(row) else Detection((), ())
