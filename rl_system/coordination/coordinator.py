"""The driver's loop: admit prompts into slots, have them generated and scored, feed the learner."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

from ray.actor import ActorHandle

from actors.pool import RolloutPool
from learners.protocols import LearnerStart
from reward_servers.policies import FailurePolicy, RewardFailure, Verdict, failure_reasons
from rl_system.coordination.experience_queue import Checkpointed, Checkpointing
from rl_system.coordination.ledger import LIVE, BatchRecord, GroupState, Ledger
from rl_system.coordination.scoring import Objects, Scorer
from vlcot.groups import Group, Prompt, ScoredGroup

CLOSE_S = 5.0
"""For the queue to say that it is closed."""


class StalledError(RuntimeError):
    """Nothing has finished for too long; the message names what everyone waits for."""


async def _stored_at_once() -> None:
    """Files on this machine are."""


@dataclass(frozen=True)
class Observer:
    """What a run wants to hear of. Callbacks return at once.

    Attributes:
        started: the learner group is up (again).
        group: a group has its rewards.
        batch: the learner is about to get a batch; a run that resumes needs the records of all steps done.
        step: a step is trained and pushed: its number, the learner's metrics and the groups of its batch.
        generating: a group was given to the rollout pool: its id.
        event: process, what it did, begin and end in epoch seconds.
        secure: ends once all that was heard so far is where a run that goes on finds it.
    """

    started: Callable[[LearnerStart], None]
    group: Callable[[ScoredGroup], None]
    batch: Callable[[BatchRecord], None]
    step: Callable[[int, dict[str, float], list[ScoredGroup]], None]
    generating: Callable[[str], None]
    event: Callable[[str, str, float, float], None]
    secure: Callable[[], Awaitable[None]] = _stored_at_once


@dataclass(frozen=True)
class Plan:
    """How much is trained, and how asynchronously (``rl_system.config.schema.CoordinationConfig``)."""

    steps: int
    groups_per_step: int
    max_staleness: int
    stall_timeout_s: float
    policy: FailurePolicy


@dataclass(frozen=True)
class Moment:
    """Where the coordinator stands.

    Attributes:
        step: steps trained.
        training: whether the learner has the batch of the next.
        groups: that are under way, by state.
        waits: one line that says since when.
        quiet_s: seconds since a group got its rewards or a step was done.
        left_alone: servers that are not asked for a while.
    """

    step: int
    training: bool
    groups: dict[str, int]
    waits: str
    quiet_s: float
    left_alone: tuple[str, ...]


class ReadyStore(Protocol):
    """Keeps groups that have their rewards over the death of the driver (:class:`rl_system.runs.ready.ReadyGroups`)."""

    def take(self, order: int, prompt: Prompt, oldest: int) -> ScoredGroup | None:
        """The group of this admission that an earlier attempt has made, none of its tokens by weights before version
        ``oldest`` or after those of the checkpoint that this attempt goes on from; None: it is to be generated."""

    def keep(self, order: int, scored: ScoredGroup) -> None:
        """A group has its rewards. Returns at once."""

    def forget(self, admitted: int) -> None:
        """A checkpoint accounts for the first ``admitted`` groups. Returns at once."""


class Coordinator:
    """Runs GRPO over a stream of prompts until ``plan.steps`` learner steps are done.

    Args:
        prompts: endless stream of prompts.
        queue: handle of an :class:`~rl_system.coordination.experience_queue.ExperienceQueue`.
        learner_error: the learner group's exception once it has died for good, else None.
        store: groups of earlier attempts; gets those that are made.
        done: records of the steps that the learner has done already; ``prompts`` go on behind them.

    Raises:
        ValueError: ``done`` has gaps.
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
        store: ReadyStore,
        done: Sequence[BatchRecord] = (),
    ) -> None:
        self._plan = plan
        self._prompts = prompts
        self._pool = pool
        self._scorer = scorer
        self._queue = queue
        self._learner_error = learner_error
        self._observer = observer
        self._store = store
        self.ledger = Ledger(plan.groups_per_step, plan.max_staleness, plan.steps * plan.groups_per_step)
        self._ready: dict[int, ScoredGroup] = {}
        self._carriers: set[asyncio.Task[None]] = set()
        self._failure: BaseException | None = None
        self._batch: list[int] = []
        """Orders of the groups that the learner trains now; empty while it waits."""
        self.ledger.restore(done, time.monotonic())
        self._step = len(done)
        self._accounted = [record.admitted for record in done]
        """Of each step, the groups that its record and those before it account for."""
        self.stopping = False
        """Whether :meth:`stop` was called."""
        self._last_progress = time.monotonic()
        self._wake = asyncio.Event()

    def stop(self) -> None:
        """End early: what the learner has it trains, nothing follows; :meth:`run` then returns."""
        self.stopping = True
        self._wake.set()

    def moment(self) -> Moment:
        """Where it stands."""
        now, counts = time.monotonic(), self.ledger.counts()
        return Moment(
            self._step,
            bool(self._batch),
            {str(state): counts[state] for state in LIVE},
            self.ledger.waiting_for(now),
            now - self._last_progress,
            self._scorer.left_alone(),
        )

    async def run(self) -> None:
        """Train to the last step, or until :meth:`stop`.

        Raises:
            StalledError: no group got its rewards and no step finished for ``stall_timeout_s``; a dropped group is no
                progress. Or the queue does not answer.
            RewardFailure: a reward failed and the failure policy tolerates none.
            RuntimeError: the learner group or the rollout pool has failed for good.
        """
        secured = 0
        try:
            await self._train()
            await self._observer.secure()  # nobody hears the learner ask before its last checkpoint
            secured = self._step
        finally:
            closing = asyncio.ensure_future(self._queue.close.remote(secured))
            await asyncio.wait([closing], timeout=CLOSE_S)
        if not closing.done():
            raise StalledError(f"the experience queue has not answered for {CLOSE_S:.0f} s; the learner waits for it")
        await closing

    async def _train(self) -> None:
        reports = asyncio.create_task(self._read_reports())
        reports.add_done_callback(lambda _: self._wake.set())
        self._last_progress = time.monotonic()
        try:
            while not reports.done() and (self._batch or not self.stopping):
                if not self.stopping:
                    self._admit()
                    await self._offer()
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._wake.wait(), timeout=1.0)
                self._wake.clear()
                self._check_failure()
                self._check_stall()
            if reports.done():
                await reports
        finally:
            tasks = [reports, *self._carriers]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _admit(self) -> None:
        # A server that is left alone would fail what is admitted now; what is under way waits for it.
        while not self._scorer.left_alone() and self.ledger.may_admit():
            prompt = next(self._prompts)
            order = self.ledger.admit(prompt.row_id, time.monotonic())
            oldest = self.ledger.trained_at(order) - self._plan.max_staleness
            if (scored := self._store.take(order, prompt, oldest)) is not None:
                self._set_ready(order, scored)
                continue
            task = asyncio.create_task(self._carry(order, prompt))
            self._carriers.add(task)
            task.add_done_callback(self._settle)

    def _settle(self, task: asyncio.Task[None]) -> None:
        self._carriers.discard(task)
        if not task.cancelled() and task.exception() is not None:
            self._failure = task.exception()
        self._wake.set()

    def _set_ready(self, order: int, scored: ScoredGroup) -> None:
        self._last_progress = time.monotonic()
        self._ready[order] = scored
        self.ledger.move(order, GroupState.READY, self._last_progress)

    async def _carry(self, order: int, prompt: Prompt) -> None:
        """Take one group from admission to READY, or drop it with a reason."""
        objects = self._scorer.find_objects(prompt)
        self.ledger.move(order, GroupState.GENERATING, time.monotonic())
        self._observer.generating(prompt.group_id)
        group = await self._pool.generate(prompt)
        generated = time.time()
        self._observer.event(f"rollout {group.actor}", prompt.group_id, generated - group.generation_s, generated)
        self.ledger.move(order, GroupState.SCORING, time.monotonic())
        scored, verdict = await self._score(group, objects)
        self._observer.event("rewards", prompt.group_id, generated, time.time())
        if verdict is Verdict.TRAIN:
            self._set_ready(order, scored)
            self._store.keep(order, scored)
        else:
            self.ledger.move(order, GroupState.DROPPED, time.monotonic(), failure_reasons(scored))
        self._observer.group(scored)

    async def _score(self, group: Group, objects: Objects) -> tuple[ScoredGroup, Verdict]:
        """Score until the failure policy has decided."""
        scored = await self._scorer.score(group, objects)
        scorings = 1
        while (verdict := self._plan.policy.verdict(scored, scorings)) is Verdict.SCORE_AGAIN:
            scored = await self._scorer.score(group, self._scorer.find_objects(group.prompt))
            scorings += 1
        return scored, verdict

    async def _offer(self) -> None:
        """Hand the next batch to the learner once its groups are ready, in order of admission."""
        batch = self.ledger.next_batch()
        if batch is not None and not self._batch:
            self._batch = batch
            step, timeout_s = self._step + 1, self._plan.stall_timeout_s
            record = self.ledger.record(step, batch)
            self._accounted.append(record.admitted)
            self._observer.batch(record)
            put = self._queue.put_batch.remote(step, [self._ready[order] for order in batch])
            try:
                await asyncio.wait_for(put, timeout_s)
            except TimeoutError:
                raise StalledError(f"the experience queue has not taken batch {step} for {timeout_s:.0f} s") from None

    async def _read_reports(self) -> None:
        """Release the slots of each batch once its weights are pushed; returns after the last step."""
        while self._step < self._plan.steps:
            event = await self._queue.next_report.remote()
            if isinstance(event, LearnerStart):
                self._observer.started(event)
            elif isinstance(event, Checkpointing):
                await self._observer.secure()
                await self._queue.secured.remote(event.step)
            elif isinstance(event, Checkpointed):
                self._store.forget(self._accounted[event.step - 1])
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
        if isinstance(self._failure, RewardFailure):
            raise self._failure
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
            dropped = list(self.ledger.dropped_rows().values())
            raise StalledError(
                f"no group and no learner step has finished for {quiet:.0f} s. "
                f"Groups: {self.ledger.waiting_for(now)}. The learner {learner}."
                + (f" {len(dropped)} groups were dropped; the last: {dropped[-1]}." if dropped else "")
                + (f" Left alone after failures: {', '.join(left)}." if (left := self._scorer.left_alone()) else "")
            )
