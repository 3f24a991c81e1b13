"""The reward client's deadline, retries, cache and checks, against small asynchronous servers."""

import asyncio
import math

import numpy as np
import pytest
from ray.serve.exceptions import BackPressureError

from reward_servers.client import GROUNDED_SAM, QWEN_VL, RetryPolicy, RewardClient
from reward_servers.contract import DetectedObject, Detection, Judgement, RewardServerError
from vlcot.groups import Failed

pytestmark = pytest.mark.unit

CAT = Detection((DetectedObject("cat", 0.9, (1.0, 2.0, 9.0, 12.0), 0.3),), ("cat",))
LR = np.arange(16 * 16 * 3, dtype=np.uint8).reshape(16, 16, 3)
FAST = RetryPolicy(attempts=3, base_delay_s=0.001, max_delay_s=0.002)


class Method:
    """One method of a server, called as on a Serve handle: ``remote`` runs the next step of a script."""

    def __init__(self, *script):
        self.script = list(script)
        self.calls = []

    def remote(self, *arguments):
        self.calls.append(arguments)
        step = self.script[min(len(self.calls), len(self.script)) - 1]
        return self._run(step)

    async def _run(self, step):
        await asyncio.sleep(0)
        if isinstance(step, float):
            await asyncio.sleep(step)
            return CAT
        if isinstance(step, Exception):
            raise step
        return step


class Server:
    def __init__(self, **methods):
        vars(self).update(methods)


def client(objects=None, judge=None, **options):
    options = {"timeout_s": 5.0, "retry": FAST, "seed": 0} | options
    return RewardClient(Server(objects=objects), Server(judge=judge), **options)


def test_an_answer_comes_through_and_is_counted():
    method = Method(CAT)
    asked = client(method)
    assert asyncio.run(asked.objects(LR)) == CAT
    stats = asked.stats[GROUNDED_SAM]
    assert (stats.count, stats.failures, stats.retries) == (1, 0, 0)
    assert 0 < stats.max_seconds == stats.seconds == stats.mean_seconds < 5
    assert asked.stats[QWEN_VL].mean_seconds is None


def test_equal_images_are_asked_once_even_at_the_same_time():
    method = Method(0.02)
    asked = client(method)

    async def three():
        first = await asyncio.gather(asked.objects(LR), asked.objects(LR.copy()))
        return [*first, await asked.objects(LR)]

    assert asyncio.run(three()) == [CAT, CAT, CAT]
    assert len(method.calls) == 1
    assert asked.stats[GROUNDED_SAM].cached == 2


def test_another_image_shape_or_setting_is_asked_again():
    other = LR.copy()
    other[0, 0, 0] += 1
    method = Method(CAT)
    asked = client(method)

    async def all_of_them():
        for image in (LR, other, LR.reshape(8, 32, 3)):
            await asked.objects(image)

    asyncio.run(all_of_them())
    assert len(method.calls) == 3

    from reward_servers.client import _content_key

    assert _content_key(LR, "box 0.25") != _content_key(LR, "box 0.3")


def test_the_cache_forgets_the_least_recently_used():
    images = [np.full((4, 4, 3), i, np.uint8) for i in range(3)]
    method = Method(CAT)
    asked = client(method, cache_size=2)

    async def visit(*order):
        for i in order:
            await asked.objects(images[i])

    asyncio.run(visit(0, 1, 0, 2, 0))
    assert len(method.calls) == 3
    asyncio.run(visit(1))
    assert len(method.calls) == 4


def test_a_caller_that_is_cancelled_leaves_the_answer_to_the_others():
    asked = client(Method(0.02))

    async def race():
        first = asyncio.create_task(asked.objects(LR))
        second = asyncio.create_task(asked.objects(LR))
        await asyncio.sleep(0.005)
        first.cancel()
        return await second

    assert asyncio.run(race()) == CAT


@pytest.mark.parametrize(
    "trouble", [RewardServerError("busy"), BackPressureError(9, 8), ConnectionError("gone"), "garbage", None]
)
def test_trouble_is_retried(trouble):
    method = Method(trouble, trouble, CAT)
    asked = client(method)
    assert asyncio.run(asked.objects(LR)) == CAT
    assert len(method.calls) == 3
    assert asked.stats[GROUNDED_SAM].retries == 2


def test_the_attempts_are_bounded_and_end_in_a_reason():
    method = Method(RewardServerError("replica died"))
    asked = client(method)
    answer = asyncio.run(asked.objects(LR))
    assert answer == Failed("grounded_sam failed 3 times; last: RewardServerError: replica died")
    assert len(method.calls) == 3
    assert asked.stats[GROUNDED_SAM].failures == 1


def test_a_full_queue_is_named_in_the_reason():
    answer = asyncio.run(client(Method(BackPressureError(9, 8))).objects(LR))
    assert isinstance(answer, Failed) and "queue is full" in answer.reason


def test_a_bad_request_is_not_sent_again():
    method = Method(ValueError("an image must be uint8"))
    answer = asyncio.run(client(method).objects(LR))
    assert answer == Failed("grounded_sam refused the request: ValueError: an image must be uint8")
    assert len(method.calls) == 1


def test_a_failure_is_not_cached():
    method = Method(ValueError("bad"), CAT)
    asked = client(method)

    async def twice():
        return await asked.objects(LR), await asked.objects(LR)

    first, second = asyncio.run(twice())
    assert isinstance(first, Failed) and second == CAT


def test_a_server_that_hangs_ends_at_the_deadline():
    asked = client(Method(60.0), timeout_s=0.05)
    answer = asyncio.run(asked.objects(LR))
    assert isinstance(answer, Failed) and "within 0.05 s" in answer.reason
    assert asked.stats[GROUNDED_SAM].max_seconds < 1


def test_a_replica_that_hangs_loses_its_request_to_another():
    method = Method(60.0, CAT)
    asked = client(method, retry=RetryPolicy(attempts=3, attempt_timeout_s=0.02, base_delay_s=0.001))
    assert asyncio.run(asked.objects(LR)) == CAT
    assert len(method.calls) == 2


def test_retry_delays_are_jittered_grow_and_stay_bounded():
    import random

    policy, rng = RetryPolicy(base_delay_s=0.1, max_delay_s=1.0), random.Random(0)
    for retry, longest in enumerate([0.1, 0.2, 0.4, 0.8, 1.0, 1.0]):
        delays = [policy.delay(retry, rng) for _ in range(200)]
        assert min(delays) >= 0 and 0.8 * longest < max(delays) <= longest


def test_judgements_come_in_order_and_are_never_cached():
    answer = [Judgement(1.0, 2.0, 3.0), Judgement(10.0, 0.0, 5.5)]
    method = Method(answer)
    asked = client(judge=method)

    async def twice():
        return [await asked.judge(LR, [LR, LR], seed) for seed in (7, 7)]

    assert asyncio.run(twice()) == [answer, answer]
    assert len(method.calls) == 2 and method.calls[0][2] == 7


@pytest.mark.parametrize(
    "answer",
    [
        [Judgement(1.0, 2.0, 3.0)],
        [Judgement(1.0, 2.0, 3.0), Judgement(math.nan, 2.0, 3.0)],
        [Judgement(1.0, 2.0, 3.0), Judgement(11.0, 2.0, 3.0)],
        [Judgement(1.0, 2.0, 3.0), Judgement(-0.5, 2.0, 3.0)],
        [1.0, 2.0],
        0.0,
        None,
    ],
)
def test_pitfall_5_an_unusable_judgement_ends_in_failed_never_in_a_number(answer):
    assert isinstance(asyncio.run(client(judge=Method(answer)).judge(LR, [LR, LR], 0)), Failed)


@pytest.mark.parametrize(
    "score, area, edge", [(math.nan, 0.3, 1.0), (0.9, math.inf, 1.0), (1.2, 0.3, 1.0), (0.9, 0.3, math.nan)]
)
def test_pitfall_5_an_impossible_detection_ends_in_failed(score, area, edge):
    broken = Detection((DetectedObject("cat", score, (edge, 2.0, 9.0, 12.0), area),), ("cat",))
    assert isinstance(asyncio.run(client(Method(broken)).objects(LR)), Failed)


def test_a_cancelled_request_raises_and_tells_the_server():
    told = []

    class Response:
        def __await__(self):
            return asyncio.sleep(60).__await__()

        def cancel(self):
            told.append(True)

    asked = client(judge=type("Hanging", (), {"remote": staticmethod(lambda *_: Response())}))

    async def cancel():
        task = asyncio.create_task(asked.judge(LR, [LR], 0))
        await asyncio.sleep(0.01)
        task.cancel()
        await task

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(cancel())
    assert told == [True]
