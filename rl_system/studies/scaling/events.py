"""The clock of the simulation, and engines that run several jobs at the same time."""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

Done = Callable[[], None]


class Clock:
    """Calls what was planned, in order of time; what is planned for one moment, in order of planning."""

    def __init__(self) -> None:
        self.now = 0.0
        """Seconds since the start."""
        self._planned: list[tuple[float, int, Done]] = []
        self._numbers = itertools.count()
        self._stopped = False

    def after(self, seconds: float, call: Done) -> None:
        """Plan ``call``."""
        heapq.heappush(self._planned, (self.now + seconds, next(self._numbers), call))

    def stop(self) -> None:
        """Let :meth:`run` return; what is planned does not happen."""
        self._stopped = True

    def run(self) -> None:
        """Until nothing is planned any more, or :meth:`stop`."""
        while self._planned and not self._stopped:
            self.now, _, call = heapq.heappop(self._planned)
            call()


@dataclass(frozen=True)
class EngineCost:
    """An engine that runs jobs together, as vLLM decodes sequences.

    Attributes:
        base_s: seconds in which every running job advances by one unit, whatever their number.
        each_s: seconds more for each running job.
        concurrent: jobs that run at the same time at most; others wait in order of arrival.
        threads: cores that it can use at the same time; only on a shared machine (:class:`Cores`).
    """

    base_s: float
    each_s: float
    concurrent: int
    threads: float = 1.0

    def __post_init__(self) -> None:
        if self.base_s < 0 or self.each_s < 0 or self.base_s + self.each_s == 0:
            raise ValueError(f"base_s={self.base_s:g} and each_s={self.each_s:g}: neither below, nor both equal to 0")
        if self.concurrent < 1 or self.threads <= 0:
            raise ValueError(f"concurrent={self.concurrent} and threads={self.threads:g} must be positive")


class Cores:
    """A machine whose cores all engines share: if the busy ones want more than there are, each gets the same part.

    Args:
        count: of cores; None: every engine has a device of its own.
    """

    def __init__(self, count: float | None) -> None:
        self._count = count
        self._engines: list[Engine] = []
        self.part = 1.0
        """Speed of every engine, of what it has alone."""

    def add(self, engine: Engine) -> None:
        """``engine`` shares the cores."""
        self._engines.append(engine)

    def changed(self) -> None:
        """An engine began or ceased to work."""
        if self._count is None:
            return
        wanted = sum(engine.cost.threads for engine in self._engines if engine.working)
        part = min(1.0, self._count / wanted) if wanted else 1.0
        if part == self.part:
            return
        for engine in self._engines:
            engine.settle()
        self.part = part
        for engine in self._engines:
            engine.plan()


class Engine:
    """Serves jobs in order of arrival; jobs that run together are equally fast.

    It counts the units by which its jobs have advanced, so that a change of speed moves no job but only the moment
    at which the nearest end is reached.
    """

    def __init__(self, cost: EngineCost, clock: Clock, cores: Cores) -> None:
        self.cost = cost
        self.busy_s = 0.0
        """Seconds with at least one running job, pauses left out."""
        self._clock, self._cores = clock, cores
        self._waiting: deque[tuple[float, Done]] = deque()
        self._running: list[tuple[float, int, Done]] = []
        self._units = 0.0
        self._settled = 0.0
        self._paused = False
        self._plan = 0
        self._numbers = itertools.count()
        cores.add(self)

    @property
    def working(self) -> bool:
        """Whether a job advances."""
        return bool(self._running) and not self._paused

    def submit(self, done: Done, *units: float) -> None:
        """Run a job of each number of units; each calls ``done`` at its end."""
        self._waiting.extend((each, done) for each in units)
        self._change()

    def pause(self, paused: bool) -> None:
        """Stop all jobs where they are, or go on."""
        self.settle()
        self._paused = paused
        self._change()

    def settle(self) -> None:
        """Bring the counts to the present; must precede every change of speed."""
        passed, self._settled = self._clock.now - self._settled, self._clock.now
        if self.working and passed > 0:
            self.busy_s += passed
            self._units += passed * self._speed()

    def plan(self) -> None:
        """Plan the next end of a job at the present speed."""
        self._plan += 1
        if self.working:
            number = self._plan
            left = max(0.0, self._running[0][0] - self._units)
            self._clock.after(left / self._speed(), lambda: self._end(number))

    def _speed(self) -> float:
        """Units per second."""
        return self._cores.part / (self.cost.base_s + self.cost.each_s * len(self._running))

    def _change(self) -> None:
        self.settle()
        while self._waiting and len(self._running) < self.cost.concurrent:
            units, done = self._waiting.popleft()
            heapq.heappush(self._running, (self._units + units, next(self._numbers), done))
        self._cores.changed()
        self.plan()

    def _end(self, number: int) -> None:
        if number != self._plan:
            return  # the speed has changed since
        self.settle()
        _, _, done = heapq.heappop(self._running)
        self._change()
        done()
