"""Plays a schedule: the real coordinator, ledger, pool, queue and scorer among simulated processes."""

from __future__ import annotations

import asyncio
import math
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import zip_longest
from pathlib import Path
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
from rl_system.runs.ready import ReadyGroups
from tests.rl_system.schedules.learner import SimulatedLearner
from tests.rl_system.schedules.loop import end_tasks, simulate
from tests.rl_system.schedules.processes import Handle, SimulatedActor, SimulatedPool, now, push
from tests.rl_system.schedules.rewards import Servers, prompt
from tests.rl_system.schedules.schedule import PATIENCE_S, STALL_TIMEOUT_S, End, Hang, Schedule
from tests.rl_system.schedules.stored import SlowWriter, damage, usable
from vlcot.groups import Prompt, ScoredGroup
from vlcot.rewards import ExpertWeights, RewardWeights

LIMIT_S = 3600.0
FOLDER = next((path for path in ("/dev/shm",) if Path(path).is_dir()), None)
"""Of temporary run directories: in memory where there is such a place."""


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
        reused: groups that the drivers took over from those before them.
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
    reused: int = 0


def play(schedule: Schedule) -> Played:
    """Play to the end.

    Raises:
        NeverEndsError: it has none.
        AssertionError: the learner was given what it must not be given.
    """
    with tempfile.TemporaryDirectory(dir=FOLDER) as folder:
        return simulate(_play(schedule, Disk(Path(folder))), LIMIT_S)


@dataclass
class Disk:
    """What outlives a driver.

    Attributes:
        ready: directory of stored groups.
        journal: records of batches; a driver goes on behind the learner's checkpoint.
        trained: rows by step in that checkpoint.
        lives: step of the checkpoint that each driver went on from.
        damaged: orders of stored groups that cannot be read.
        failed_rows: rows of which a request to a server failed; only the checks look at them.
    """

    ready: Path
    journal: list[BatchRecord] = field(default_factory=list)
    trained: dict[int, list[int]] = field(default_factory=dict)
    lives: dict[int, int] = field(default_factory=dict)
    damaged: set[int] = field(default_factory=set)
    failed_rows: set[int] = field(default_factory=set)


async def _play(schedule: Schedule, disk: Disk) -> Played:
    chance = Random(schedule.seed)
    drivers = reused = 0
    ends = (*schedule.driver_ends, (math.inf, End.KILL))
    for (seconds, how), what in zip_longest(ends, schedule.damages[: len(ends)]):
        driver = Driver(schedule, chance, disk, drivers)
        drivers += 1
        error = await driver.live(seconds, how)
        reused += driver.reused
        if driver.learner.error is not None:
            raise driver.learner.error
        if error is not None or driver.finished:
            break
        disk.trained = {step: rows for step, rows in driver.learner.trained.items() if step <= driver.learner.saved}
        disk.damaged |= damage(disk.ready, what, chance)
    progress = max(driver.last_group, driver.learner.last_report)
    ledger = driver.ledger
    rows = driver.learner.trained
    return Played(error, now(), progress, ledger, rows, disk.journal, driver.taken, disk.failed_rows, drivers, reused)


class Driver:
    """One life of the driver, and of all processes that end with it.

    Args:
        disk: what earlier ones have left.
        number: 0, 1, ...; all but the first go on.
    """

    def __init__(self, schedule: Schedule, chance: Random, disk: Disk, number: int) -> None:
        self._schedule = schedule
        self._chance = chance
        self._disk = disk
        self._number = number
        self._writer = SlowWriter(schedule, chance)
        self._must_use: set[int] = set()
        self._coordinator: Coordinator | None = None
        self.taken = 0
        self._secured = 0
        """Steps whose rows would survive the machine."""
        self.last_group = 0.0
        self.finished = False
        delay = partial(chance.uniform, 0, schedule.pace.call)
        self._store = WeightStore()
        self._actors = [SimulatedActor(index, schedule, chance, number) for index in range(schedule.actors)]
        self._pool = SimulatedPool(self._actors, self._store, schedule.actor_failures, delay)
        self._queue = Handle(SimulatedQueue(schedule), delay)
        self._servers = Servers(schedule, chance, disk.failed_rows)
        send = partial(push, actors=self._actors, store=self._store, schedule=schedule, chance=chance)
        self.learner = SimulatedLearner(
            schedule,
            chance,
            self._queue,
            send,
            disk.trained,
            disk.journal,
            disk.failed_rows,
            disk.lives,
            lambda: self._secured,
        )
        self._announce_deaths()

    @property
    def ledger(self) -> Ledger:
        assert self._coordinator is not None
        return self._coordinator.ledger

    @property
    def reused(self) -> int:
        """Groups that this driver has taken over so far."""
        return len(self._store._reused) if self._coordinator is not None else 0

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
        if life.done() and self._coordinator is not None:
            await self._writer.finish()
        await end_tasks(kept)
        if isinstance(error, Exception | None):
            self._check_reuse()
            return error
        raise error

    async def _run(self) -> None:
        done: list[BatchRecord] = []
        if self._number:
            start = await self._queue.next_report.remote()
            done = self._disk.journal[: start.step]
            assert {r.step: list(r.rows) for r in done} == self.learner.trained, "the journal is not what was trained"
        del self._disk.journal[len(done) :]
        self._disk.lives[self._number] = len(done)
        self.taken = done[-1].admitted if done else 0
        self._store = self._open_store(self.taken, len(done))
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
            Observer(
                lambda _: None,
                self._on_group,
                self._disk.journal.append,
                lambda *_: None,
                lambda *_: None,
                lambda *_: None,
                self._secure,
            ),
            self._store,
            done,
        )
        self.last_group = now()
        await self._coordinator.run()

    async def _secure(self) -> None:
        heard = len(self._disk.journal)
        await asyncio.sleep(self._chance.uniform(0, self._schedule.pace.push))
        self._secured = heard

    def _open_store(self, admitted: int, step: int) -> ReadyGroups:
        unreadable = {order for order in self._disk.damaged if order >= admitted}
        self._must_use, lost = usable(self._disk.ready, self._schedule, admitted, step, self._disk.damaged)
        store = ReadyGroups(self._disk.ready, admitted, step, self._writer)
        assert store.refused == +Counter(unreadable=len(unreadable), lost_weights=lost)
        self._disk.damaged.clear()  # those files are deleted
        return store

    def _check_reuse(self) -> None:
        """What could be used was, once its row was admitted."""
        if self._coordinator is not None:
            wanted = {f"group-{order}" for order in self._must_use if order < self.taken}
            assert wanted <= self._store._reused, f"generated again: {wanted - self._store._reused}"

    def _prompts(self, skip: int) -> Iterator[Prompt]:
        for row in range(skip, 10_000):
            self.taken = row + 1
            yield prompt(row)

    def _scorer(self) -> Scorer:
        patience = 1e9 if self._schedule.hang is Hang.PATIENT_SERVERS else PATIENCE_S
        retry, breaker = RetryPolicy(attempts=2, base_delay_s=0.5), BreakerPolicy(failures=3, pause_s=5.0)
        client = RewardClient(self._servers, patience, retry, breaker, seed=self._schedule.seed)
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
