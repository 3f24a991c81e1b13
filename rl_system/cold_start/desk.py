"""The actor between the driver and the ranks of a cold start: reports come out, the wish to stop goes in."""

from __future__ import annotations

import ray
from ray.actor import ActorHandle

from learners.protocols import LearnerStart
from rl_system.coordination.experience_queue import Mailbox, StepReport


class Desk(Mailbox):
    """An asyncio Ray actor."""

    def __init__(self) -> None:
        super().__init__()
        self._stopping = False
        self._answers: dict[int, bool] = {}

    async def stop(self) -> None:
        """No step begins from now on that no rank has asked for."""
        self._stopping = True

    async def goes_on(self, step: int) -> bool:
        """Whether ``step`` is made; every rank hears what the first one heard."""
        return self._answers.setdefault(step, not self._stopping)


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
