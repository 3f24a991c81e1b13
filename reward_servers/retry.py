"""How often a request to a reward server is sent."""

from __future__ import annotations

import random
from dataclasses import dataclass


@dataclass(frozen=True)
class RetryPolicy:
    """How often a request is sent.

    Attributes:
        attempts: that may fail, first one included; one that meets a full queue does not count, it is sent again until
            the deadline.
        attempt_timeout_s: after this a request is given up and sent again; None waits for the deadline.
        hedge_after_s: an attempt that has no answer after so long is sent a second time, the first usable answer
            counts and the other request is cancelled; None: never.
        base_delay_s: upper end of the random delay before the first retry; it doubles with every further one.
        max_delay_s: upper end of every delay.
    """

    attempts: int = 4
    attempt_timeout_s: float | None = None
    hedge_after_s: float | None = None
    base_delay_s: float = 0.2
    max_delay_s: float = 5.0

    def __post_init__(self) -> None:
        if self.attempts < 1:
            raise ValueError(f"attempts must be at least 1, got {self.attempts}")
        for name in ("attempt_timeout_s", "hedge_after_s"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name} must be positive, got {value:g}")

    def delay(self, retry: int, rng: random.Random) -> float:
        """Seconds before retry number ``retry`` (from 0), uniform from 0, so that clients come back apart."""
        return rng.uniform(0.0, min(self.max_delay_s, self.base_delay_s * 2 ** min(retry, 32)))
