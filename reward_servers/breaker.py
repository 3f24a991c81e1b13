"""A circuit breaker: a server that fails again and again is left alone for a while instead of being asked on."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

_LOOK_AGAIN_S = 0.05
"""Between two looks of a request that waits while another one probes the server."""


@dataclass(frozen=True)
class BreakerPolicy:
    """When a server is left alone.

    Attributes:
        failures: attempts that fail in a row, over all requests, before it is. Of attempts that were under way
            together only the first failure counts: one dead replica fails all that it had.
        pause_s: how long; then one request probes it, and only if that is answered the others follow.
    """

    failures: int = 8
    pause_s: float = 5.0

    def __post_init__(self) -> None:
        if self.failures < 1:
            raise ValueError(f"failures must be at least 1, got {self.failures}")
        if self.pause_s < 0:
            raise ValueError(f"pause_s must not be negative, got {self.pause_s:g}")


@dataclass(frozen=True)
class Attempt:
    """One attempt that a breaker let pass. ``began`` on its clock; ``probe``: whether the others wait for it."""

    began: float
    probe: bool


class CircuitBreaker:
    """State of one server. For one event loop.

    Args:
        policy: when it opens, and for how long.
        clock: seconds.
    """

    def __init__(self, policy: BreakerPolicy, clock: Callable[[], float] = time.monotonic) -> None:
        self._policy = policy
        self._clock = clock
        self._failures = 0
        self._last_failure = -math.inf
        self._closed_again = 0.0
        """When the next probe may go, while open."""
        self._probing = False
        self.opened = 0
        """How often the server was left alone."""

    @property
    def open(self) -> bool:
        """Whether requests are held back: after so many failures, until a probe is answered."""
        return self._failures >= self._policy.failures

    @property
    def left_alone(self) -> bool:
        """Whether no further request would be sent now. Open, but ready for a probe, is not left alone."""
        return self.open and (self._probing or self._clock() < self._closed_again)

    async def passes(self, deadline: float) -> Attempt | None:
        """Wait until a request may be sent; None if that is not before ``deadline`` (of ``clock``)."""
        while self.open:
            now = self._clock()
            if not self._probing and now >= self._closed_again:
                self._probing = True
                return Attempt(now, probe=True)
            wait = _LOOK_AGAIN_S if self._probing else self._closed_again - now
            if now + wait >= deadline:
                return None
            await asyncio.sleep(wait)
        return Attempt(self._clock(), probe=False)

    def succeeded(self) -> None:
        """An attempt was answered, or refused for what it asked: the server works."""
        self._failures, self._probing = 0, False

    def failed(self, attempt: Attempt) -> None:
        """An attempt got no usable answer."""
        self._probing &= not attempt.probe
        if attempt.began < self._last_failure:
            return
        was_open, self._last_failure = self.open, self._clock()
        self._failures += 1
        if self.open:
            self._closed_again = self._clock() + self._policy.pause_s
            self.opened += not was_open

    def given_up(self, attempt: Attempt) -> None:
        """An attempt was cancelled by its caller, which tells nothing of the server."""
        self._probing &= not attempt.probe
