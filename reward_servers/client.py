"""The one way to ask reward servers: a deadline, bounded retries, and an answer or a reason.

No failure becomes a number here: what could not be scored is ``Failed`` and enters no mean, loss or denominator.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
import random
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import ray
from ray.serve.exceptions import BackPressureError

from reward_servers.contract import Detection, Judgement, RewardServerError
from vlcot.groups import Failed
from vlcot.rewards import EXPERT_SCALE

Answer = TypeVar("Answer")

GROUNDED_SAM, QWEN_VL = "grounded_sam", "qwen_vl"

_BY_REFERENCE = 64 * 1024
"""Bytes from which an image goes through the object store: by value it would be copied once more per request."""


@dataclass(frozen=True)
class RetryPolicy:
    """How often a request is sent.

    Attributes:
        attempts: first one included.
        attempt_timeout_s: after this a request is given up and sent again; None waits for the deadline.
        base_delay_s: upper end of the random delay before the first retry; it doubles with every further one.
        max_delay_s: upper end of every delay.
    """

    attempts: int = 4
    attempt_timeout_s: float | None = None
    base_delay_s: float = 0.2
    max_delay_s: float = 5.0

    def __post_init__(self) -> None:
        if self.attempts < 1:
            raise ValueError(f"attempts must be at least 1, got {self.attempts}")

    def delay(self, retry: int, rng: random.Random) -> float:
        """Seconds before retry number ``retry`` (from 0), uniform from 0, so that clients come back apart."""
        return rng.uniform(0.0, min(self.max_delay_s, self.base_delay_s * 2**retry))


@dataclass
class ServerStats:
    """Requests to one server.

    Attributes:
        count: requests that ended, failed ones included.
        failures: of them.
        retries: further attempts.
        cached: answers from the cache; no request was made.
        seconds: sum over the requests, retries and delays included.
        max_seconds: slowest request.
    """

    count: int = 0
    failures: int = 0
    retries: int = 0
    cached: int = 0
    seconds: float = 0.0
    max_seconds: float = 0.0

    @property
    def mean_seconds(self) -> float | None:
        """None before the first request has ended."""
        return self.seconds / self.count if self.count else None


class RewardClient:
    """Asks Grounded-SAM and the visual expert. One per event loop.

    Args:
        grounded_sam: Serve handle of ``deploy_grounded_sam``: ``objects.remote(image)`` gives an awaitable.
        visual_expert: Serve handle of ``deploy_visual_expert``: ``judge.remote(lr, images, seed)``.
        timeout_s: deadline of one request, retries included.
        retry: how often it is sent before that.
        settings: what the detections depend on beside the image (thresholds, vocabulary); part of the cache's key.
        cache_size: detections kept, least recently used dropped first.
        seed: of the retry delays.
    """

    def __init__(
        self,
        grounded_sam: Any,
        visual_expert: Any,
        timeout_s: float = 120.0,
        retry: RetryPolicy | None = None,
        settings: str = "",
        cache_size: int = 4096,
        seed: int | None = None,
    ) -> None:
        if not 0 < timeout_s < math.inf:
            raise ValueError(f"timeout_s must be positive and finite, got {timeout_s}")
        self._grounded_sam = grounded_sam
        self._visual_expert = visual_expert
        self._timeout_s = timeout_s
        self._retry = retry or RetryPolicy()
        self._settings = settings
        self._cache_size = cache_size
        self._cache: OrderedDict[bytes, asyncio.Task[Detection | Failed]] = OrderedDict()
        self._rng = random.Random(seed)
        self.stats = {GROUNDED_SAM: ServerStats(), QWEN_VL: ServerStats()}

    async def objects(self, image: np.ndarray) -> Detection | Failed:
        """Objects of an LR image uint8 [H, W, 3]; equal images are asked once, also at the same time.

        A failure is not kept: the next call asks again.
        """
        key = _content_key(image, self._settings)
        task = self._cache.get(key)
        if task is None:
            task = asyncio.create_task(self._detect(image))
            task.add_done_callback(lambda done: self._forget_failure(key, done))
            self._cache[key] = task
            while len(self._cache) > self._cache_size:
                self._cache.popitem(last=False)
        else:
            self._cache.move_to_end(key)
            self.stats[GROUNDED_SAM].cached += 1
        # One caller that is cancelled must not take the answer from the others.
        return await asyncio.shield(task)

    async def judge(self, lr: np.ndarray, images: Sequence[np.ndarray], seed: int) -> list[Judgement] | Failed:
        """The expert's scores of a group's images uint8 [H, W, 3], in their order.

        Args:
            lr: the image that they restore, uint8 [h, w, 3].
            images: restorations, of one size.
            seed: of the order in which the expert sees them.
        """

        def ask() -> Awaitable[Any]:
            return self._visual_expert.judge.remote(sent_lr, sent, seed)

        sent_lr, sent = _sendable(lr), [_sendable(image) for image in images]
        return await self._request(QWEN_VL, ask, lambda answer: _check_judgements(answer, len(images)))

    async def _detect(self, image: np.ndarray) -> Detection | Failed:
        sent = _sendable(image)
        return await self._request(GROUNDED_SAM, lambda: self._grounded_sam.objects.remote(sent), _check_detection)

    def _forget_failure(self, key: bytes, task: asyncio.Task[Detection | Failed]) -> None:
        if task.cancelled() or task.exception() is not None or isinstance(task.result(), Failed):
            self._cache.pop(key, None)

    async def _request(
        self, server: str, ask: Callable[[], Awaitable[Any]], check: Callable[[Any], Answer]
    ) -> Answer | Failed:
        """Send until a usable answer comes, the attempts or the time run out, or the request itself is bad."""
        stats, started = self.stats[server], time.monotonic()
        deadline = started + self._timeout_s
        reason = ""
        result: Answer | Failed | None = None
        attempt = 0
        while result is None:
            try:
                result = check(await asyncio.wait_for(_awaited(ask), self._attempt_seconds(deadline)))
            except TimeoutError:
                reason = "no answer in time"
            except (TypeError, ValueError) as error:  # the request is at fault: sending it again cannot help
                result = Failed(f"{server} refused the request: {_message(error)}")
            except BackPressureError as error:
                reason = f"its queue is full: {_message(error)}"
            except Exception as error:
                # Whatever a server, its replica or Ray raises ends as a reason; nothing here may end a run.
                reason = _message(error)
            attempt += 1
            if result is None:
                result = await self._before_retry(server, attempt, deadline, reason)
        seconds = time.monotonic() - started
        stats.count += 1
        stats.failures += isinstance(result, Failed)
        stats.seconds += seconds
        stats.max_seconds = max(stats.max_seconds, seconds)
        return result

    async def _before_retry(self, server: str, attempt: int, deadline: float, reason: str) -> Failed | None:
        """Wait before the next attempt; Failed if there is none."""
        if attempt >= self._retry.attempts:
            return Failed(f"{server} failed {attempt} times; last: {reason}")
        delay = self._retry.delay(attempt - 1, self._rng)
        if time.monotonic() + delay >= deadline:
            return Failed(f"{server} gave no answer within {self._timeout_s:g} s ({attempt} attempts); last: {reason}")
        await asyncio.sleep(delay)
        self.stats[server].retries += 1
        return None

    def _attempt_seconds(self, deadline: float) -> float:
        left = max(deadline - time.monotonic(), 0.0)
        longest = self._retry.attempt_timeout_s
        return left if longest is None else min(left, longest)


async def _awaited(ask: Callable[[], Awaitable[Any]]) -> Any:
    response = ask()
    try:
        return await response
    except asyncio.CancelledError:
        # Given up here: the replica should not go on working for nobody. Serve's responses can be cancelled.
        if hasattr(response, "cancel"):
            response.cancel()
        raise


def _content_key(image: np.ndarray, settings: str) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    digest.update(f"{settings}|{image.dtype}|{image.shape}|".encode())
    digest.update(np.ascontiguousarray(image).tobytes())
    return digest.digest()


def _sendable(image: np.ndarray) -> np.ndarray | ray.ObjectRef:
    return ray.put(image) if image.nbytes >= _BY_REFERENCE and ray.is_initialized() else image


def _check_detection(answer: Any) -> Detection:
    if not isinstance(answer, Detection):
        raise RewardServerError(f"the answer is no Detection but {type(answer).__name__}")
    for item in answer.objects:
        if not (0 <= item.score <= 1 and 0 <= item.mask_area <= 1 and all(map(math.isfinite, item.box))):
            raise RewardServerError(f"an object has an impossible score, area or box: {item}")
    return answer


def _check_judgements(answer: Any, count: int) -> list[Judgement]:
    if not isinstance(answer, list) or not all(isinstance(item, Judgement) for item in answer):
        raise RewardServerError(f"the answer is no list of Judgements but {type(answer).__name__}")
    if len(answer) != count:
        raise RewardServerError(f"{len(answer)} judgements for {count} images")
    for item in answer:
        if not all(0 <= value <= EXPERT_SCALE for value in (item.quality, item.realism, item.consistency)):
            raise RewardServerError(f"a judgement lies outside [0, {EXPERT_SCALE:g}]: {item}")
    return answer


def _message(error: BaseException) -> str:
    """Type and last line: Ray puts the remote traceback before the message."""
    cause = getattr(error, "cause", None) or error
    lines = str(cause).strip().splitlines()
    return f"{type(cause).__name__}: {lines[-1]}" if lines else type(cause).__name__
