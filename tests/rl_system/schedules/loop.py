"""An event loop whose time is simulated, and the clock of the modules under test."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any, TypeVar
from unittest import mock

from actors import pool
from reward_servers import client
from reward_servers.breaker import CircuitBreaker
from rl_system.coordination import coordinator, scoring

T = TypeVar("T")


class NeverEndsError(AssertionError):
    """Nothing is left to happen, or the simulated time is over."""


class SimulatedLoop(asyncio.BaseEventLoop):
    """Time stands still while something can run, then jumps to the next timer. There is no input or output.

    Args:
        limit_s: simulated seconds after which whatever still runs counts as hanging.
    """

    def __init__(self, limit_s: float) -> None:
        super().__init__()
        self._limit_s = limit_s
        self._now = 0.0
        self._selector = self
        self.set_exception_handler(lambda *_: None)  # futures of calls whose caller was killed

    def time(self) -> float:
        return self._now

    def select(self, timeout: float | None) -> list[Any]:
        """What the loop calls to wait."""
        if timeout is None:
            raise NeverEndsError(f"everything waits, for ever, since {self._now:.1f} s")
        self._now += timeout
        if self._now > self._limit_s:
            raise NeverEndsError(f"still running after {self._now:.1f} s")
        return []

    def _process_events(self, event_list: list[Any]) -> None:
        pass

    def run_in_executor(self, executor: Any, func: Callable[..., Any], *args: Any) -> asyncio.Future[Any]:
        """At once, in no time."""
        future = self.create_future()
        future.set_result(func(*args))
        return future


@contextmanager
def simulated_clock(loop: SimulatedLoop) -> Iterator[None]:
    """Coordinator, pool and reward client read the loop's time; ``ray.kill`` in the pool kills simulated actors."""
    clock = SimpleNamespace(monotonic=loop.time, time=loop.time)
    kill = SimpleNamespace(kill=lambda handle, no_restart: handle.served.die())
    with ExitStack() as stack:
        for module in (coordinator, scoring, client, pool):
            stack.enter_context(mock.patch.object(module, "time", clock))
        stack.enter_context(mock.patch.object(client, "CircuitBreaker", partial(CircuitBreaker, clock=loop.time)))
        stack.enter_context(mock.patch.object(pool, "ray", kill))
        yield


def simulate(story: Coroutine[Any, Any, T], limit_s: float) -> T:
    """What ``story`` returns in simulated time.

    Raises:
        NeverEndsError: it did not end within ``limit_s``.
    """
    loop = SimulatedLoop(limit_s)
    try:
        with simulated_clock(loop):
            return loop.run_until_complete(story)
    finally:
        for task in asyncio.all_tasks(loop):
            task.cancel()
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()


async def end_tasks(kept: set[asyncio.Task[Any]]) -> None:
    """Kill every task but those ``kept`` and the caller."""
    others = asyncio.all_tasks() - kept - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
