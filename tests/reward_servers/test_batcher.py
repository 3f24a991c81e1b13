"""Batches are made of what waits when the model is free, and every request gets its own answer."""

from __future__ import annotations

import asyncio
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reward_servers.batcher import Batcher

pytestmark = pytest.mark.unit


class Model:
    """Squares numbers; ``hold`` keeps it busy until it is told to go on."""

    def __init__(self, hold: bool = False) -> None:
        self.batches: list[list[int]] = []
        self.go_on = threading.Semaphore(0 if hold else 1_000_000)

    def run(self, requests: list[int]) -> list[int]:
        self.batches.append(requests)
        self.go_on.acquire()
        return [r * r for r in requests]


async def begun(model: Model, batches: int) -> None:
    while len(model.batches) < batches:
        await asyncio.sleep(0.001)


def test_what_comes_while_the_model_works_makes_its_next_batches():
    async def scenario() -> None:
        model = Model(hold=True)
        batcher = Batcher(model.run, 4, 0.001)
        first = asyncio.create_task(batcher.answer(0))
        await begun(model, 1)
        others = []
        for number in range(1, 7):  # further apart than wait_s
            others.append(asyncio.create_task(batcher.answer(number)))
            await asyncio.sleep(0.003)
        model.go_on.release(3)
        assert await asyncio.gather(first, *others) == [n * n for n in range(7)]
        assert model.batches == [[0], [1, 2, 3, 4], [5, 6]]

    asyncio.run(scenario())


def test_an_idle_model_waits_for_a_batch_to_fill_but_no_longer():
    async def scenario() -> None:
        model = Model()
        patient = Batcher(model.run, 3, 60.0)
        assert await asyncio.gather(*(patient.answer(n) for n in range(3))) == [0, 1, 4]
        assert await asyncio.gather(*(patient.answer(n) for n in range(3))) == [0, 1, 4]
        assert await Batcher(model.run, 3, 0.0).answer(5) == 25
        assert await Batcher(model.run, 1, 60.0).answer(6) == 36
        assert [len(batch) for batch in model.batches] == [3, 3, 1, 1]

    asyncio.run(scenario())


def test_what_is_given_up_before_its_batch_begins_is_not_run():
    async def scenario() -> None:
        model = Model(hold=True)
        batcher = Batcher(model.run, 2, 0.0)
        first = asyncio.create_task(batcher.answer(1))
        await begun(model, 1)
        lost, kept = (asyncio.create_task(batcher.answer(n)) for n in (2, 3))
        await asyncio.sleep(0)
        lost.cancel()
        first.cancel()  # under way: it runs, and nobody is told
        model.go_on.release(2)
        assert await kept == 9
        assert model.batches == [[1], [3]]
        assert lost.cancelled() and first.cancelled()

    asyncio.run(scenario())


def test_one_bad_request_does_not_fail_its_batch():
    def run(requests: list[int]) -> list[float]:
        return [1 / request for request in requests]

    async def scenario() -> None:
        batcher = Batcher(run, 3, 60.0)
        answers = await asyncio.gather(*(batcher.answer(n) for n in (1, 0, 2)), return_exceptions=True)
        assert answers[0] == 1 and isinstance(answers[1], ZeroDivisionError) and answers[2] == 0.5
        assert await asyncio.gather(*(batcher.answer(n) for n in (4, 5, 8))) == [0.25, 0.2, 0.125]

    asyncio.run(scenario())


def test_a_batch_with_too_few_answers_is_an_error():
    async def scenario() -> None:
        with pytest.raises(RuntimeError, match="0 answers to a batch of 1"):
            await Batcher(lambda requests: [], 2, 0.0).answer(1)

    asyncio.run(scenario())


@settings(max_examples=50, deadline=None)
@given(
    size=st.integers(1, 5),
    events=st.lists(st.tuples(st.sampled_from(["ask", "give up", "pause"]), st.integers(0, 9)), max_size=25),
)
def test_every_request_is_answered_once_whatever_the_order(size, events):
    async def scenario() -> None:
        model = Model()
        batcher = Batcher(model.run, size, 0.0)
        asked: list[asyncio.Task[int]] = []
        given_up = set()
        for event, number in events:
            if event == "ask":
                asked.append(asyncio.create_task(batcher.answer(len(asked))))
            elif event == "give up" and asked:
                given_up.add(number % len(asked))
                asked[number % len(asked)].cancel()
            else:
                await asyncio.sleep(0.0002)
        answers = await asyncio.gather(*asked, return_exceptions=True)
        for index, answer in enumerate(answers):
            assert answer == index * index or (index in given_up and isinstance(answer, asyncio.CancelledError))
        ran = [request for batch in model.batches for request in batch]
        assert len(ran) == len(set(ran)) and all(1 <= len(batch) <= size for batch in model.batches)

    asyncio.run(scenario())


@pytest.mark.parametrize(("size", "wait_s"), [(0, 1.0), (1, -1.0)])
def test_an_impossible_batch_is_refused(size, wait_s):
    with pytest.raises(ValueError, match="size >= 1 and wait_s >= 0"):
        Batcher(list, size, wait_s)
