"""The actor between coordinator and learner ranks: batches go in, progress comes out."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TypeAlias

import ray
from ray.actor import ActorHandle

from learners.protocols import LearnerStart
from vlcot.groups import ScoredGroup


@dataclass(frozen=True)
class StepReport:
    """The learner has trained ``step`` and the actors serve its weights."""

    step: int
    metrics: dict[str, float]


@dataclass(frozen=True)
class Checkpointing:
    """The learner waits until it may write a checkpoint of ``step``."""

    step: int


@dataclass(frozen=True)
class Checkpointed:
    """The learner's newest checkpoint contains ``step``."""

    step: int


Event: TypeAlias = LearnerStart | StepReport | Checkpointing | Checkpointed


class Mailbox:
    """What the learner says to the driver, read in order, and the one answer that it waits for. Of an asyncio actor."""

    def __init__(self) -> None:
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._secured_step = 0
        self._answered = asyncio.Condition()

    async def report(self, event: Event) -> None:
        """Hand an event to the driver."""
        await self._events.put(event)

    async def next_report(self) -> Event:
        """The oldest event not yet read."""
        return await self._events.get()

    async def checkpointing(self, step: int) -> None:
        """Return once the driver has stored all that a checkpoint of ``step`` counts on."""
        if step > self._secured_step:
            await self.report(Checkpointing(step))
        async with self._answered:
            await self._answered.wait_for(lambda: step <= self._secured_step)

    async def secured(self, step: int) -> None:
        """Checkpoints up to ``step`` may be written."""
        async with self._answered:
            self._secured_step = max(self._secured_step, step)
            self._answered.notify_all()


class ExperienceQueue(Mailbox):
    """An asyncio Ray actor. A batch is kept until a checkpoint contains its step: a restarted learner asks again."""

    def __init__(self) -> None:
        super().__init__()
        self._batches: dict[int, list[ScoredGroup]] = {}
        self._closed = False
        self._changed = asyncio.Condition()

    async def put_batch(self, step: int, groups: list[ScoredGroup]) -> None:
        """Offer the batch of ``step``.

        Raises:
            RuntimeError: the step has a batch already.
        """
        async with self._changed:
            if step in self._batches:
                raise RuntimeError(f"step {step} has a batch already")
            self._batches[step] = groups
            self._changed.notify_all()

    async def close(self, secured: int = 0) -> None:
        """No further batch will come; checkpoints up to ``secured`` may be written."""
        async with self._changed:
            self._closed = True
            self._changed.notify_all()
        await self.secured(secured)

    async def next_batch(self, step: int) -> list[ScoredGroup] | None:
        """The batch of ``step``, the same for every rank; None when the run is over."""
        async with self._changed:
            await self._changed.wait_for(lambda: step in self._batches or self._closed)
            return self._batches.get(step)

    async def forget(self, step: int) -> None:
        """Drop the batches up to ``step``: a checkpoint contains it."""
        self._batches = {s: batch for s, batch in self._batches.items() if s > step}
        await self.report(Checkpointed(step))


class QueueSource:
    """The learner's view of the queue (:class:`learners.protocols.BatchSource`)."""

    def __init__(self, queue: ActorHandle) -> None:
        self._queue = queue

    def next_batch(self, step: int) -> list[ScoredGroup] | None:
        """Block until the batch of ``step`` is there; None when the run is over."""
        return ray.get(self._queue.next_batch.remote(step))


class QueueProgress:
    """The learner's way to tell how far it is (:class:`learners.protocols.ProgressSink`)."""

    def __init__(self, queue: ActorHandle) -> None:
        self._queue = queue

    def started(self, start: LearnerStart) -> None:
        """The group is up."""
        ray.get(self._queue.report.remote(start))

    def report(self, step: int, metrics: dict[str, float]) -> None:
        """``step`` is trained and its weights are served."""
        ray.get(self._queue.report.remote(StepReport(step, metrics)))

    def checkpointing(self, step: int) -> None:
        """Block until a checkpoint of ``step`` may be written."""
        ray.get(self._queue.checkpointing.remote(step))

    def checkpointed(self, step: int) -> None:
        """A checkpoint contains ``step``: its batch will not be asked for again."""
        ray.get(self._queue.forget.remote(step))
