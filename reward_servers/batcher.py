"""Dynamic batching: requests that wait while the model is at work make its next batch.

Ray Serve's ``serve.batch`` closes a batch ``batch_wait_timeout_s`` after its first request, also while the model is
still busy with the one before, so that under a steady load batches stay small (2.9 of 8 for the toy's detector, which
cost half of what batching gains; ``benchmarks/rewards.py``). Here a batch is closed when the model can take it.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Generic, TypeVar

Request = TypeVar("Request")
Answer = TypeVar("Answer")


class Batcher(Generic[Request, Answer]):
    """Runs requests in batches, in one thread, one batch at a time. For one event loop.

    Args:
        run: answers a batch, one answer for each request in their order; called in a thread of its own.
        size: largest batch.
        wait_s: how long a model that has nothing to do waits for a batch to fill, seconds.

    Raises:
        ValueError: ``size`` is below 1 or ``wait_s`` negative.
    """

    def __init__(self, run: Callable[[list[Request]], Sequence[Answer]], size: int, wait_s: float) -> None:
        if size < 1 or wait_s < 0:
            raise ValueError(f"a batch needs size >= 1 and wait_s >= 0, got {size} and {wait_s}")
        self._run = run
        self._size = size
        self._wait_s = wait_s
        self._waiting: deque[tuple[Request, asyncio.Future[Answer]]] = deque()
        self._full = asyncio.Event()
        self._worker: asyncio.Task[None] | None = None

    async def answer(self, request: Request) -> Answer:
        """The answer to ``request``. One that is cancelled before its batch begins is not run.

        Raises:
            Exception: what ``run`` raised of this request; a batch that raises is run again, one request at a time.
        """
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._waiting.append((request, future))
        if len(self._waiting) >= self._size:
            self._full.set()
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work())
        return await future

    async def _work(self) -> None:
        """Until nothing waits. Only the first batch may wait for more: what comes meanwhile has waited already."""
        if self._size > 1:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._full.wait(), self._wait_s)
        while batch := self._next_batch():
            await self._answer_all(batch)

    def _next_batch(self) -> list[tuple[Request, asyncio.Future[Answer]]]:
        batch: list[tuple[Request, asyncio.Future[Answer]]] = []
        while self._waiting and len(batch) < self._size:
            request, future = self._waiting.popleft()
            if not future.done():
                batch.append((request, future))
        if len(self._waiting) < self._size:
            self._full.clear()
        return batch

    async def _answer_all(self, batch: list[tuple[Request, asyncio.Future[Answer]]]) -> None:
        try:
            answers = await asyncio.to_thread(self._run, [request for request, _ in batch])
            if len(answers) != len(batch):
                raise RuntimeError(f"{len(answers)} answers to a batch of {len(batch)}")
        except Exception as error:  # whatever a model raises is the answer to the one whose request it was
            if len(batch) > 1:
                for single in batch:
                    await self._answer_all([single])
            elif not batch[0][1].done():
                batch[0][1].set_exception(error)
            return
        for (_, future), answer in zip(batch, answers, strict=True):
            if not future.done():
                future.set_result(answer)
