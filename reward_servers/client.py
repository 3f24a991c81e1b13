"""The one way to ask reward servers: a deadline, bounded retries, and an answer or a reason.

No failure becomes a number here: what could not be scored is ``Failed`` and enters no mean, loss or denominator.
"""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np

from reward_servers import answers
from reward_servers.breaker import Attempt, BreakerPolicy, CircuitBreaker
from reward_servers.contract import Captions, Detection, Judgement, Measurement, OverloadedError, Tags
from reward_servers.retry import RetryPolicy
from reward_servers.transports import Transport
from vlcot.groups import Failed

Answer = TypeVar("Answer")

GROUNDED_SAM, QWEN_VL, IQA = "grounded_sam", "qwen_vl", "iqa"


@dataclass
class ServerStats:
    """Requests to one server.

    Attributes:
        count: requests that ended, failed ones included.
        failures: of them.
        retries: further attempts.
        hedged: second requests of attempts that took long.
        seconds: sum over the requests, retries and delays included.
        max_seconds: slowest request.
    """

    count: int = 0
    failures: int = 0
    retries: int = 0
    hedged: int = 0
    seconds: float = 0.0
    max_seconds: float = 0.0

    @property
    def mean_seconds(self) -> float | None:
        """None before the first request has ended."""
        return self.seconds / self.count if self.count else None


class RewardClient:
    """Asks the reward servers. One per event loop; equal requests are the servers' to remember.

    Args:
        transport: how requests reach them.
        timeout_s: deadline of one request, retries and waiting for a server that is left alone included.
        retry: how often it is sent before that.
        breaker: when a server is left alone.
        seed: of the retry delays.
    """

    def __init__(
        self,
        transport: Transport,
        timeout_s: float = 120.0,
        retry: RetryPolicy | None = None,
        breaker: BreakerPolicy | None = None,
        seed: int | None = None,
    ) -> None:
        if not 0 < timeout_s < math.inf:
            raise ValueError(f"timeout_s must be positive and finite, got {timeout_s}")
        self._transport = transport
        self._timeout_s = timeout_s
        self._retry = retry or RetryPolicy()
        policy = breaker or BreakerPolicy()
        self._breakers: defaultdict[str, CircuitBreaker] = defaultdict(lambda: CircuitBreaker(policy))
        self._rng = random.Random(seed)
        self.stats: defaultdict[str, ServerStats] = defaultdict(ServerStats)
        """By server."""

    def left_alone(self) -> tuple[str, ...]:
        """Servers that failed again and again and are not asked for a while."""
        return tuple(server for server, breaker in self._breakers.items() if breaker.left_alone)

    async def objects(
        self, image: np.ndarray, names: Sequence[str] | None = None, masks: bool = False
    ) -> Detection | Failed:
        """Objects in an image uint8 [H, W, 3].

        Args:
            image: RGB.
            names: what to look for; None: the server's vocabulary.
            masks: whether to answer masks too.
        """
        arguments = {"image": image, "names": None if names is None else list(names), "masks": masks}
        return await self._request(GROUNDED_SAM, "objects", arguments, answers.detection)

    async def judge(self, lr: np.ndarray, images: Sequence[np.ndarray], seed: int) -> list[Judgement] | Failed:
        """The expert's scores of a group's images uint8 [H, W, 3], in their order.

        Args:
            lr: the image that they restore, uint8 [h, w, 3].
            images: restorations, of one size.
            seed: of the order in which the expert sees them.
        """
        arguments = {"lr": lr, "images": list(images), "seed": seed}
        return await self._request(QWEN_VL, "judge", arguments, partial(answers.judgements, count=len(images)))

    async def caption(self, image: np.ndarray) -> Captions | Failed:
        """Coarse, middle and fine text of an image uint8 [n, n, 3]."""
        return await self._request(QWEN_VL, "caption", {"image": image}, answers.captions)

    async def tag(self, image: np.ndarray) -> Tags | Failed:
        """Names of the objects in an image uint8 [H, W, 3], as the visual expert sees them."""
        return await self._request(QWEN_VL, "tag", {"image": image}, answers.tags)

    async def measure(self, images: Sequence[np.ndarray], reference: np.ndarray | None = None) -> Measurement | Failed:
        """The server's metrics of images uint8 [H, W, 3]; ``reference`` is the truth for those that compare."""
        arguments = {"images": list(images), "reference": reference}
        return await self._request(IQA, "measure", arguments, partial(answers.measurement, count=len(images)))

    async def score(self, server: str, lr: np.ndarray, images: Sequence[np.ndarray]) -> list[float] | Failed:
        """The reward in [0, 1] of each image uint8 [H, W, 3], of a server of the user's own (``reward.extra``)."""
        arguments = {"lr": lr, "images": list(images)}
        return await self._request(server, "score", arguments, partial(answers.shares, count=len(images)))

    async def close(self) -> None:
        """Give the transport's connections back."""
        await self._transport.close()

    async def _request(
        self, server: str, method: str, arguments: Mapping[str, Any], check: Callable[[Any], Answer]
    ) -> Answer | Failed:
        """Send until a usable answer comes, the attempts or the time run out, or the request itself is bad."""
        started = time.monotonic()

        async def ask() -> Answer:
            return check(await self._transport.call(server, method, arguments))

        result = await self._until_answered(server, ask, started + self._timeout_s)
        seconds, stats = time.monotonic() - started, self.stats[server]
        stats.count += 1
        stats.failures += isinstance(result, Failed)
        stats.seconds += seconds
        stats.max_seconds = max(stats.max_seconds, seconds)
        return result

    async def _until_answered(
        self, server: str, ask: Callable[[], Awaitable[Answer]], deadline: float
    ) -> Answer | Failed:
        breaker, longest = self._breakers[server], self._retry.attempt_timeout_s
        reason, tried, failed = "", 0, 0
        while True:
            if (attempt := await breaker.passes(deadline)) is None:
                return self._late(server, tried, reason or "it is left alone after failing again and again")
            seconds = self._attempt_seconds(deadline)
            whole = not tried or seconds == longest
            answer = await self._attempt(server, ask, attempt, seconds, whole)
            if not isinstance(answer, _NoAnswer):
                return answer
            tried, failed, reason = tried + 1, failed + answer.counts, answer.reason or reason
            if failed >= self._retry.attempts:
                return Failed(f"{server} failed {failed} times; last: {reason}")
            delay = self._retry.delay(tried - 1, self._rng)
            if time.monotonic() + delay >= deadline:
                return self._late(server, tried, reason)
            await asyncio.sleep(delay)
            self.stats[server].retries += 1

    def _late(self, server: str, attempts: int, reason: str) -> Failed:
        return Failed(f"{server} gave no answer within {self._timeout_s:g} s ({attempts} attempts); last: {reason}")

    async def _attempt(
        self, server: str, ask: Callable[[], Awaitable[Answer]], attempt: Attempt, seconds: float, whole: bool
    ) -> Answer | Failed | _NoAnswer:
        """One attempt; Failed where another one cannot help.

        Args:
            seconds: that it may take.
            whole: whether that is its full time; what the request's deadline cuts short tells nothing of the server.
        """
        breaker = self._breakers[server]
        try:
            answer = await asyncio.wait_for(self._hedged(server, ask), seconds)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                breaker.given_up(attempt)
                raise
            breaker.failed(attempt)  # not the caller's: Serve hands on what was cancelled inside a replica
            return _NoAnswer("the server cancelled the request")
        except TimeoutError:
            if whole:
                breaker.failed(attempt)
            else:
                breaker.given_up(attempt)
            return _NoAnswer("no answer in time" if whole else "")
        except (TypeError, ValueError) as error:
            breaker.succeeded()
            return Failed(f"{server} refused the request: {message(error)}")
        except OverloadedError as error:  # it works, and hard: no reason to leave it alone
            breaker.succeeded()
            return _NoAnswer(f"its queue is full: {message(error)}", counts=False)
        except Exception as error:
            # Whatever a server, its replica or Ray raises ends as a reason; nothing here may end a run.
            breaker.failed(attempt)
            return _NoAnswer(message(error))
        breaker.succeeded()
        return answer

    async def _hedged(self, server: str, ask: Callable[[], Awaitable[Answer]]) -> Answer:
        """The first usable answer of a request and, if it takes long, of a second one like it."""
        if self._retry.hedge_after_s is None:
            return await ask()
        running: set[asyncio.Future[Answer]] = {asyncio.ensure_future(ask())}
        try:
            done, _ = await asyncio.wait(running, timeout=self._retry.hedge_after_s)
            if not done:
                self.stats[server].hedged += 1
                running.add(asyncio.ensure_future(ask()))
            return await _first_success(running)
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)

    def _attempt_seconds(self, deadline: float) -> float:
        left = max(deadline - time.monotonic(), 0.0)
        longest = self._retry.attempt_timeout_s
        return left if longest is None else min(left, longest)


@dataclass(frozen=True)
class _NoAnswer:
    """An attempt that failed in a way that another one may not.

    Attributes:
        reason: empty if an earlier one says more.
        counts: as one of ``RetryPolicy.attempts``.
    """

    reason: str
    counts: bool = True


async def _first_success(tasks: set[asyncio.Future[Answer]]) -> Answer:
    """The first result; the last error if there is none."""
    pending = set(tasks)
    while True:
        done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
        answered = [task for task in done if task.exception() is None]
        if answered or not pending:
            return (answered or list(done))[0].result()


def message(error: BaseException) -> str:
    """Type and last line: Ray puts the remote traceback before the message."""
    cause = getattr(error, "cause", None) or error
    lines = str(cause).strip().splitlines()
    return f"{type(cause).__name__}: {lines[-1]}" if lines else type(cause).__name__
