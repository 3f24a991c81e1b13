"""The driver's loop: admit prompts into slots, have them generated and scored, feed the learner."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ray.actor import ActorHandle

from actors.pool import RolloutPool
from learners.protocols import LearnerStart
from rl_system.coordination.ledger import GroupState, Ledger
from rl_system.coordination.scoring import MinViableGroup, Scorer
from vlcot.groups import Prompt, ScoredGroup


class StalledError(RuntimeError):
    """Nothing has finished for too long; the message names what everyone waits for."""


@dataclass(frozen=True)
class Observer:
    """What a run wants to hear of. Callbacks return at once.

    Attributes:
        started: the learner group is up (again).
        group: a group has its rewards.
        step: a step is trained and pushed: its number, the learner's metrics and the groups of its batch.
        event: process, what it did, begin and end in epoch seconds.
    """

    started: Callable[[LearnerStart], None]
    group: Callable[[ScoredGroup], None]
    step: Callable[[int, dict[str, float], list[ScoredGroup]], None]
    event: Callable[[str, str, float, float], None]


@dataclass(frozen=True)
class Plan:
    """How much is trained, and how asynchronously (``rl_system.config.schema.CoordinationConfig``)."""

    steps: int
    groups_per_step: int
    max_staleness: int
    stall_timeout_s: float
    policy: MinViableGroup


class Coordinator:
    """Runs GRPO over a stream of prompts until ``plan.steps`` learner steps are done.

    Args:
        prompts: endless stream of prompts.
        queue: handle of an :class:`~rl_system.coordination.experience_queue.ExperienceQueue`.
        learner_error: the learner group's exception once it has died for good, else None.
    """

    def __init__(
        self,
        plan: Plan,
        prompts: Iterator[Prompt],
        pool: RolloutPool,
        scorer: Scorer,
        queue: ActorHandle,
        learner_error: Callable[[], BaseException | None],
        observer: Observer,
    ) -> None:
        self._plan = plan
        self._prompts = prompts
        self._pool = pool
        self._scorer = scorer
        self._queue = queue
        self._learner_error = learner_error
        self._observer = observer
        self.ledger = Ledger(plan.groups_per_step, plan.max_staleness, plan.steps * plan.groups_per_step)
        self._ready: dict[int, ScoredGroup] = {}
        self._carriers: set[asyncio.Task[None]] = set()
        self._failure: BaseException | None = None
        self._batch: list[int] = []
        """Orders of the groups that the learner trains now; empty while it waits."""
        self._step = 0
        self._last_progress = time.monotonic()
        self._wake = asyncio.Event()

    async def run(self) -> None:
        """Train to the last step.

        Raises:
            StalledError: no group or step has finished for ``stall_timeout_s``.
            RuntimeError: the learner group or the rollout pool has failed for good.
        """
        reports = asyncio.create_task(self._read_reports())
        reports.add_done_callback(lambda _: self._wake.set())
        self._last_progress = time.monotonic()
        try:
            while not reports.done():
                self._admit()
                await self._offer()
                try:
                    await asyncio.wait_for(self._wake.wait(), timeout=1.0)
                except TimeoutError:
                    self._check_stall()
                self._wake.clear()
                self._check_failure()
            await reports
        finally:
            tasks = [reports, *self._carriers]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self._queue.close.remote()

    def _admit(self) -> None:
        while self.ledger.may_admit():
            prompt = next(self._prompts)
            order = self.ledger.admit(prompt.row_id, time.monotonic())
            task = asyncio.create_task(self._carry(order, prompt))
            self._carriers.add(task)
            task.add_done_callback(self._settle)

    def _settle(self, task: asyncio.Task[None]) -> None:
        self._carriers.discard(task)
        if not task.cancelled() and task.exception() is not None:
            self._failure = task.exception()
        self._wake.set()

    async def _carry(self, order: int, prompt: Prompt) -> None:
        """Take one group from admission to READY, or drop it with a reason."""
        objects = self._scorer.find_objects(prompt.lr_image)
        self.ledger.move(order, GroupState.GENERATING, time.monotonic())
        group = await self._pool.generate(prompt)
        generated = time.time()
        self._observer.event(f"rollout {group.actor}", prompt.group_id, generated - group.generation_s, generated)
        self.ledger.move(order, GroupState.SCORING, time.monotonic())
        scored = await self._scorer.score(group, objects)
        self._observer.event("rewards", prompt.group_id, generated, time.time())
        self._last_progress = now = time.monotonic()
        valid = int(scored.valid.sum())
        if self._plan.policy.viable(valid, len(group.samples)):
            self._ready[order] = scored
            self.ledger.move(order, GroupState.READY, now)
        else:
            reason = f"only {valid} of {len(group.samples)} samples have a reward"
            self.ledger.move(order, GroupState.DROPPED, now, reason)
        self._observer.group(scored)

    async def _offer(self) -> None:
        """Hand the next batch to the learner once its groups are ready, in order of admission."""
        batch = self.ledger.next_batch()
        if batch is not None and not self._batch:
            self._batch = batch
            await self._queue.put_batch.remote(self._step + 1, [self._ready[order] for order in batch])

    async def _read_reports(self) -> None:
        """Release the slots of each batch once its weights are pushed; returns after the last step."""
        while self._step < self._plan.steps:
            event = await self._queue.next_report.remote()
            if isinstance(event, LearnerStart):
                self._observer.started(event)
            elif event.step == self._step + 1:  # a restarted learner repeats the steps after its checkpoint
                self._release(event.step, event.metrics)
            self._last_progress = time.monotonic()
            self._wake.set()

    def _release(self, step: int, metrics: dict[str, float]) -> None:
        now = time.monotonic()
        for order in self._batch:
            self.ledger.move(order, GroupState.TRAINED, now)
        groups = [self._ready.pop(order) for order in self._batch]
        self._batch, self._step = [], step
        self._observer.step(step, metrics, groups)

    def _check_failure(self) -> None:
        if self._failure is not None:
            raise RuntimeError(f"a group could not be generated or scored: {self._failure}") from self._failure
        error = self._learner_error()
        if error is not None:
            raise RuntimeError(f"the learner group failed: {error}") from error

    def _check_stall(self) -> None:
        now = time.monotonic()
        quiet = now - self._last_progress
        if quiet > self._plan.stall_timeout_s:
            learner = (
                f"trains step {self._step + 1}" if self._batch else f"waits for the batch of step {self._step + 1}"
            )
            raise StalledError(
                f"no group and no learner step has finished for {quiet:.0f} s. "
                f"Groups: {self.ledger.waiting_for(now)}. The learner {learner}."
            )
