"""The actor between the driver and the ranks of a cold start: reports come out, the wish to stop goes in."""

from __future__ import annotations

import asyncio
from typing import TypeAlias

import ray
from ray.actor import ActorHandle

from learners.protocols import LearnerStart
from rl_system.coordination.experience_queue import Checkpointing, Gate, StepReport

Event: TypeAlias = LearnerStart | StepReport | Checkpointing


class Desk:
    """An asyncio Ray actor."""

    def __init__(self) -> None:
        self._stopping = False
        self._answers: dict[int, bool] = {}
        self._reports: asyncio.Queue[Event] = asyncio.Queue()
        self._secured = Gate()

    async def stop(self) -> None:
        """No step begins from now on that no rank has asked for."""
        self._stopping = True

    async def goes_on(self, step: int) -> bool:
        """Whether ``step`` is made; every rank hears what the first one heard."""
        return self._answers.setdefault(step, not self._stopping)

    async def checkpointing(self, step: int) -> None:
        """Return once the driver has stored all that a checkpoint of ``step`` counts on."""
        if not self._secured.open(step):
            await self.report(Checkpointing(step))
        await self._secured.wait(step)

    async def secured(self, step: int) -> None:
        """Checkpoints up to ``step`` may be written."""
        await self._secured.let(step)

    async def report(self, event: Event) -> None:
        """Hand an event to the driver."""
        await self._reports.put(event)

    async def next_report(self) -> Event:
        """The oldest event not yet read."""
        return await self._reports.get()


class DeskLine:
    """The ranks' way to the desk (:class:`learners.protocols.SupervisedLine`)."""

    def __init__(self, desk: ActorHandle) -> None:
        self._desk = desk

    def started(self, start: LearnerStart) -> None:
        """The group is up."""
        ray.get(self._desk.report.remote(start))

    def report(self, step: int, metrics: dict[str, float]) -> None:
        """``step`` is trained."""
        ray.get(self._desk.report.remote(StepReport(step, metrics)))

    def checkpointing(self, step: int) -> None:
        """Block until a checkpoint of ``step`` may be written."""
        ray.get(self._desk.checkpointing.remote(step))

    def checkpointed(self, step: int) -> None:
        """Nothing is kept for a step."""

    def goes_on(self, step: int) -> bool:
        """Whether ``step`` is to be made."""
        return ray.get(self._desk.goes_on.remote(step))
