"""Answers that a replica gave before, by content of the request and the settings it was answered under."""

from __future__ import annotations

import asyncio
import hashlib
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from typing import Any, Generic, TypeVar

import numpy as np

Answer = TypeVar("Answer")


class AnswerCache(Generic[Answer]):
    """Least recently used answers are dropped first. For one event loop.

    Args:
        size: answers kept; 0 keeps none.
    """

    def __init__(self, size: int) -> None:
        if size < 0:
            raise ValueError(f"the cache's size must not be negative, got {size}")
        self._size = size
        self._tasks: OrderedDict[bytes, asyncio.Task[Answer]] = OrderedDict()
        self.hits = 0

    async def answer(self, key: bytes, ask: Callable[[], Awaitable[Answer]]) -> Answer:
        """The answer kept under ``key``, else that of ``ask``; equal requests at the same time ask once.

        A failure is not kept: the next call asks again. One caller that is cancelled does not take the answer from
        the others.
        """
        task = self._tasks.get(key)
        if task is None:
            task = asyncio.ensure_future(ask())
            task.add_done_callback(lambda done: self._forget_failure(key, done))
            self._tasks[key] = task
            while len(self._tasks) > max(self._size, 1):
                self._tasks.popitem(last=False)
        else:
            self._tasks.move_to_end(key)
            self.hits += 1
        return await asyncio.shield(task)

    def _forget_failure(self, key: bytes, task: asyncio.Task[Answer]) -> None:
        failed = task.cancelled() or task.exception() is not None
        if (failed or not self._size) and self._tasks.get(key) is task:
            del self._tasks[key]


def content_key(*parts: Any) -> bytes:
    """Digest of arrays (dtype, shape and content) and of anything else's ``repr``."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        if isinstance(part, np.ndarray):
            digest.update(f"array {part.dtype} {part.shape}|".encode())
            digest.update(np.ascontiguousarray(part).tobytes())
        else:
            digest.update(f"{part!r}|".encode())
    return digest.digest()
