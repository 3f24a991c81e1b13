"""Plays a schedule: the real coordinator, ledger, pool, queue and scorer among simulated processes."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from random import Random

from actors.weight_store import WeightStore
from reward_servers.breaker import BreakerPolicy
from reward_servers.client import RewardClient
from reward_servers.retry import RetryPolicy
from rl_system.coordination.coordinator import Coordinator, Observer, Plan
from rl_system.coordination.experience_queue import ExperienceQueue
from rl_system.coordination.experts import VisualExpert
from rl_system.coordination.ledger import BatchRecord, GroupState, Ledger
from rl_system.coordination.objects import DetectedObjects
from rl_system.coordination.scoring import Scorer
from tests.rl_system.schedules.learner import SimulatedLearner
from tests.rl_system.schedules.loop import end_tasks, simulate
from tests.rl_system.schedules.processes import Handle, SimulatedActor, SimulatedPool, now, push
from tests.rl_system.schedules.rewards import Servers, prompt
from tests.rl_system.schedules.schedule import PATIENCE_S, STALL_TIMEOUT_S, End, Hang, Schedule
from vlcot.groups import Prompt, ScoredGroup
from vlcot.rewards import ExpertWeights, RewardWeights

LIMIT_S = 3600.0


@dataclass
class Played:
    """How a schedule went.

    Attributes:
        error: that ended the last driver; None if it came to its end.
        ended: when, simulated seconds.
        last_progress: when a group last got its rewards or the learner last reported.
        ledger: of the last driver.
        trained: rows by step, as the learner that lived to the end has trained them.
        journal: what would stand in the run directory.
        taken: rows of the prompts before the first that was never admitted.
        failed_rows: rows of which a request to a server failed.
        drivers: how many there were.
    """

    error: Exception | None
    ended: float
    last_progress: float
    ledger: Ledger
    trained: dict[int, list[int]]
    journal: list[BatchRecord]
    taken: int
    failed_rows: set[int] = field(default_factory=set)
    drivers: int = 1


def play(schedule: Schedule) -> Played:
    """Play to the end.

    Raises:
        NeverEndsError: it has none.
        AssertionError: the learner was given what it must not be given.
    """
    return simulate(_play(schedule), LIMIT_S)


async def _play(schedule: Schedule) -> Played:
    chance = Random(schedule.seed)
    journal: list[BatchRecord] = []
    trained: dict[int, list[int]] = {}
    drivers = 0
    for seconds, how in (*schedule.driver_ends, (math.inf, End.KILL)):
        driver = Driver(schedule, chance, journal, trained, resumed=drivers > 0)
        drivers += 1
        error = await driver.live(seconds, how)
        if driver.learner.error is not None:
            raise driver.learner.error
        if error is not None or driver.finished:
            break
        trained = {step: rows for step, rows in driver.learner.trained.items() if step <= driver.learner.saved}
    progress = max(driver.last_group, driver.learner.last_report)
    ledger = driver.ledger
    failed = driver.servers.failed_rows
    return Played(error, now(), progress, ledger, driver.learner.trained, journal, driver.taken, failed, drivers)


class Driver:
    """One life of the driver, and of all processes that end with it.

    Args:
        journal: records of earlier ones; goes on behind the learner's checkpoint.
        trained: rows by step in that checkpoint.
    """

    def __init__(
        self,
        schedule: Schedule,
        chance: Random,
        journal: list[BatchRecord],
        trained: dict[int, list[int]],
        resumed: bool,
    ) -> None:
        self._schedule = schedule
        self._chance = chance
        self._journal = journal
        self._resumed = resumed
        self._coordinator: Coordinator | None = None
        self.taken = 0
        self.last_group = 0.0
        self.finished = False
        delay = partial(chance.uniform, 0, schedule.pace.call)
        self._store = WeightStore()
        self._actors = [SimulatedActor(index, schedule, chance) for index in range(schedule.actors)]
        self._pool = SimulatedPool(self._actors, self._store, schedule.actor_failures, delay)
        self._queue = Handle(SimulatedQueue(schedule), delay)
        self.servers = Servers(schedule, chance)
        send = partial(push, actors=self._actors, store=self._store, schedule=schedule, chance=chance)
        self.learner = SimulatedLearner(schedule, chance, self._queue, send, trained, journal, self.servers.failed_rows)
        self._announce_deaths()

    @property
    def ledger(self) -> Ledger:
        assert self._coordinator is not None
        return self._coordinator.ledger

    def _announce_deaths(self) -> None:
        loop = asyncio.get_running_loop()
        deaths = [
            *((at, lambda: self._chance.choice(self._actors).die()) for at in self._schedule.actor_deaths),
            *((at, lambda: self._chance.choice(self._actors).lose_engine()) for at in self._schedule.engine_deaths),
            *((at, self.learner.die) for at in self._schedule.learner_deaths),
        ]
        if self._schedule.hang is Hang.RESTARTS:
            deaths += [(self._schedule.hang_at, actor.die) for actor in self._actors]
        for at, die in deaths:
            if at >= now():
                loop.call_at(at, die)

    async def live(self, seconds: float, how: End) -> Exception | None:
        """Until the run's end, or for ``seconds``; the error that ended it."""
        kept = asyncio.all_tasks()
        learner = asyncio.create_task(self.learner.run())
        life = asyncio.create_task(self._run())
        await asyncio.wait([life], timeout=None if seconds == math.inf else seconds)
        if not life.done() and how is End.STOP and self._coordinator is not None:
            self._coordinator.stop()
            await asyncio.wait([life])
        error = life.exception() if life.done() else None
        if life.done() and error is None:
            if self._schedule.hang is Hang.NOTHING:
                await learner  # the driver waits for its last checkpoint, without a watchdog
            self.finished = self.learner.error is None and self.learner.steps == self._schedule.steps
        await end_tasks(kept)
        if isinstance(error, Exception | None):
            return error
        raise error

    async def _run(self) -> None:
        done: list[BatchRecord] = []
        if self._resumed:
            start = await self._queue.next_report.remote()
            done = self._journal[: start.step]
            assert {r.step: list(r.rows) for r in done} == self.learner.trained, "the journal is not what was trained"
        del self._journal[len(done) :]
        self.taken = done[-1].admitted if done else 0
        self._coordinator = Coordinator(
            Plan(
                steps=self._schedule.steps,
                groups_per_step=self._schedule.groups_per_step,
                max_staleness=self._schedule.max_staleness,
                stall_timeout_s=STALL_TIMEOUT_S,
                policy=self._schedule.policy,
            ),
            self._prompts(self.taken),
            self._pool,
            self._scorer(),
            self._queue,
            lambda: self.learner.error,
            Observer(lambda _: None, self._on_group, self._journal.append, lambda *_: None, lambda *_: None),
            done,
        )
        self.last_group = now()
        await self._coordinator.run()

    def _prompts(self, skip: int) -> Iterator[Prompt]:
        for row in range(skip, 10_000):
            self.taken = row + 1
            yield prompt(row)

    def _scorer(self) -> Scorer:
        patience = 1e9 if self._schedule.hang is Hang.PATIENT_SERVERS else PATIENCE_S
        retry, breaker = RetryPolicy(attempts=2, base_delay_s=0.5), BreakerPolicy(failures=3, pause_s=5.0)
        client = RewardClient(self.servers, patience, retry, breaker, seed=self._schedule.seed)
        expert = VisualExpert(client, ExpertWeights())
        return Scorer(RewardWeights(), DetectedObjects(client), expert, {}, client.left_alone)

    def _on_group(self, group: ScoredGroup) -> None:
        states = {entry.row_id: entry.state for entry in self.ledger._entries.values()}
        if states[group.group.prompt.row_id] is not GroupState.DROPPED:
            self.last_group = now()


class SimulatedQueue(ExperienceQueue):
    """The real queue, on a node that may be lost."""

    def __init__(self, schedule: Schedule) -> None:
        super().__init__()
        self._schedule = schedule

    def __getattribute__(self, name: str):
        if name in ("put_batch", "next_report", "close", "next_batch", "report"):
            schedule = object.__getattribute__(self, "_schedule")
            if schedule.hang is Hang.QUEUE and now() >= schedule.hang_at:
                return lambda *_: asyncio.Event().wait()
        return object.__getattribute__(self, name)
