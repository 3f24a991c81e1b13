"""Answers that a replica keeps."""

import asyncio

import numpy as np
import pytest

from reward_servers.answer_cache import AnswerCache, content_key

pytestmark = pytest.mark.unit

IMAGE = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)


class Model:
    def __init__(self):
        self.calls = 0

    async def ask(self):
        self.calls += 1
        await asyncio.sleep(0.01)
        return self.calls


def test_equal_requests_are_asked_once_even_at_the_same_time():
    async def story():
        cache, model = AnswerCache(8), Model()
        together = await asyncio.gather(cache.answer(b"a", model.ask), cache.answer(b"a", model.ask))
        return [*together, await cache.answer(b"a", model.ask)], model.calls, cache.hits

    assert asyncio.run(story()) == ([1, 1, 1], 1, 2)


def test_the_key_is_content_and_everything_else_that_matters():
    other = IMAGE.copy()
    other[0, 0, 0] += 1
    keys = [content_key(IMAGE, None), content_key(other, None), content_key(IMAGE.reshape(2, 8, 3), None)]
    keys += [content_key(IMAGE, ["cat"]), content_key(IMAGE.astype(np.int8), None), content_key(IMAGE, "None")]
    assert len(set(keys)) == len(keys)
    assert content_key(IMAGE.copy(), None) == keys[0]
    turned = np.asfortranarray(IMAGE)
    assert content_key(turned, None) == keys[0]


def test_the_least_recently_used_is_dropped_and_a_cache_of_none_keeps_none():
    async def visited(size, order):
        cache, model = AnswerCache(size), Model()
        for key in order:
            await cache.answer(bytes([key]), model.ask)
        return model.calls

    assert asyncio.run(visited(2, [0, 1, 0, 2, 0])) == 3
    assert asyncio.run(visited(2, [0, 1, 0, 2, 0, 1])) == 4
    assert asyncio.run(visited(0, [0, 0, 0])) == 3


def test_a_failure_is_not_kept():
    async def fail():
        raise ValueError("bad")

    async def story():
        cache = AnswerCache(8)
        with pytest.raises(ValueError):
            await cache.answer(b"a", fail)
        await asyncio.sleep(0)
        return await cache.answer(b"a", Model().ask)

    assert asyncio.run(story()) == 1


def test_a_caller_that_is_cancelled_leaves_the_answer_to_the_others():
    async def race():
        cache, model = AnswerCache(8), Model()
        first, second = (asyncio.create_task(cache.answer(b"a", model.ask)) for _ in range(2))
        await asyncio.sleep(0.002)
        first.cancel()
        return await second

    assert asyncio.run(race()) == 1


def test_a_negative_size_is_refused():
    with pytest.raises(ValueError, match="must not be negative"):
        AnswerCache(-1)
