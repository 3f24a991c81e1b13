"""The reward client's deadline, retries, hedges, circuit breaker and checks, against small asynchronous servers."""

import asyncio
import math
from types import SimpleNamespace

import numpy as np
import pytest

from reward_servers.breaker import BreakerPolicy
from reward_servers.client import GROUNDED_SAM, IQA, QWEN_VL, RewardClient
from reward_servers.contract import (
    DetectedObject,
    Detection,
    Judgement,
    Measurement,
    OverloadedError,
    RewardServerError,
)
from reward_servers.retry import RetryPolicy
from reward_servers.transports import HandleTransport
from vlcot.groups import Failed

pytestmark = pytest.mark.unit

CAT = Detection((DetectedObject("cat", 0.9, (1.0, 2.0, 9.0, 12.0), 0.3),), ("cat",))
LR = np.arange(16 * 16 * 3, dtype=np.uint8).reshape(16, 16, 3)
FAST = RetryPolicy(attempts=3, base_delay_s=0.001, max_delay_s=0.002)


class Method:
    """One method of a server: every call runs the next step of a script, the last one again and again."""

    def __init__(self, *script):
        self.script = list(script)
        self.calls = []

    async def __call__(self, arguments):
        self.calls.append(arguments)
        step = self.script[min(len(self.calls), len(self.script)) - 1]
        await asyncio.sleep(0)
        if isinstance(step, float):
            await asyncio.sleep(step)
            return CAT
        if isinstance(step, BaseException):
            raise step
        return step


class Script:
    """A transport that runs methods."""

    def __init__(self, **methods):
        self.methods = methods

    async def call(self, server, method, arguments):
        return await self.methods[method](arguments)


def client(objects=None, judge=None, measure=None, **options):
    options = {"timeout_s": 5.0, "retry": FAST, "seed": 0} | options
    return RewardClient(Script(objects=objects, judge=judge, measure=measure), **options)


def test_an_answer_comes_through_and_is_counted():
    method = Method(CAT)
    asked = client(method)
    assert asyncio.run(asked.objects(LR)) == CAT
    stats = asked.stats[GROUNDED_SAM]
    assert (stats.count, stats.failures, stats.retries) == (1, 0, 0)
    assert 0 < stats.max_seconds == stats.seconds == stats.mean_seconds < 5
    assert asked.stats[QWEN_VL].mean_seconds is None


@pytest.mark.parametrize(
    "trouble", [RewardServerError("busy"), OverloadedError("9 wait"), ConnectionError("gone"), "garbage", None]
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


def test_a_full_queue_is_waited_for_until_the_deadline_and_then_named():
    full = OverloadedError("9 wait")
    assert asyncio.run(client(Method(*[full] * 20, CAT)).objects(LR)) == CAT
    answer = asyncio.run(client(Method(full), timeout_s=0.5).objects(LR))
    assert isinstance(answer, Failed) and "queue is full" in answer.reason and "within 0.5 s" in answer.reason


def test_what_the_server_cancels_is_retried_and_does_not_cancel_the_caller():
    assert asyncio.run(client(Method(asyncio.CancelledError(), CAT)).objects(LR)) == CAT
    answer = asyncio.run(client(Method(asyncio.CancelledError())).objects(LR))
    assert answer == Failed("grounded_sam failed 3 times; last: the server cancelled the request")


def test_a_bad_request_is_not_sent_again():
    method = Method(ValueError("an image must be uint8"))
    answer = asyncio.run(client(method).objects(LR))
    assert answer == Failed("grounded_sam refused the request: ValueError: an image must be uint8")
    assert len(method.calls) == 1


def test_a_server_that_hangs_ends_at_the_deadline():
    asked = client(Method(60.0), timeout_s=0.05)
    answer = asyncio.run(asked.objects(LR))
    assert isinstance(answer, Failed) and "within 0.05 s" in answer.reason
    assert asked.stats[GROUNDED_SAM].max_seconds < 30


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


def test_judgements_come_in_order_and_each_is_asked_for():
    answer = [Judgement(1.0, 2.0, 3.0), Judgement(10.0, 0.0, 5.5)]
    method = Method(answer)
    asked = client(judge=method)

    async def twice():
        return [await asked.judge(LR, [LR, LR], seed) for seed in (7, 7)]

    assert asyncio.run(twice()) == [answer, answer]
    assert len(method.calls) == 2 and method.calls[0]["seed"] == 7


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


def test_an_impossible_main_object_or_measurement_ends_in_failed():
    unseen = Detection(CAT.objects, ("dog",))
    assert isinstance(asyncio.run(client(Method(unseen)).objects(LR)), Failed)
    for values in ({}, {"PSNR": (1.0,)}, {"PSNR": (1.0, math.nan)}):
        asked = client(measure=Method(Measurement(values)))
        assert isinstance(asyncio.run(asked.measure([LR, LR])), Failed)
    good = Measurement({"PSNR": (1.0, 2.0)})
    assert asyncio.run(client(measure=Method(good)).measure([LR, LR])) == good


def test_a_slow_request_is_hedged_and_the_first_usable_answer_counts():
    method = Method(60.0, CAT)
    asked = client(method, retry=RetryPolicy(attempts=1, hedge_after_s=0.02))
    assert asyncio.run(asked.objects(LR)) == CAT
    assert len(method.calls) == 2 and asked.stats[GROUNDED_SAM].hedged == 1
    quick = Method(CAT)
    assert asyncio.run(client(quick, retry=RetryPolicy(attempts=1, hedge_after_s=5.0)).objects(LR)) == CAT
    assert len(quick.calls) == 1


def test_a_hedge_that_fails_leaves_the_answer_of_the_first():
    method = Method(0.1, RewardServerError("no"))
    asked = client(method, retry=RetryPolicy(attempts=1, hedge_after_s=0.02))
    assert asyncio.run(asked.objects(LR)) == CAT
    both = client(Method(RewardServerError("no")), retry=RetryPolicy(attempts=1, hedge_after_s=0.02))
    assert asyncio.run(both.objects(LR)) == Failed("grounded_sam failed 1 times; last: RewardServerError: no")


def test_a_server_that_keeps_failing_is_left_alone_then_probed_once():
    method = Method(*[RewardServerError("down")] * 3, CAT)
    asked = client(method, retry=RetryPolicy(attempts=3, base_delay_s=0.0), breaker=BreakerPolicy(3, pause_s=0.5))

    async def story():
        first = await asked.objects(LR)
        held_back = asked.left_alone()
        many = [asyncio.create_task(asked.objects(LR)) for _ in range(5)]
        await asyncio.sleep(0.02)
        during = len(method.calls)
        return first, held_back, during, await asyncio.gather(*many), asked.left_alone()

    first, held_back, during, answers, after = asyncio.run(story())
    assert isinstance(first, Failed) and held_back == (GROUNDED_SAM,)
    assert during == 3 and answers == [CAT] * 5 and after == () and len(method.calls) == 8


def test_requests_that_fail_together_count_as_one_failure():
    """One dead replica fails all that it had under way; the others serve."""
    method = Method(*[RewardServerError("replica died")] * 16, CAT)
    asked = client(method, breaker=BreakerPolicy(3, pause_s=60))

    async def together():
        return await asyncio.gather(*(asked.objects(LR) for _ in range(16)))

    assert asyncio.run(together()) == [CAT] * 16 and asked.left_alone() == ()


def test_after_its_pause_a_server_is_not_left_alone_so_that_something_probes_it():
    asked = client(Method(RewardServerError("down")), breaker=BreakerPolicy(3, pause_s=0.02))

    async def story():
        await asked.objects(LR)
        await asyncio.sleep(0.03)
        return asked.left_alone()

    assert asyncio.run(story()) == ()


def test_a_server_that_stays_down_ends_requests_at_their_deadline_with_the_reason():
    method = Method(RewardServerError("down"))
    asked = client(method, timeout_s=2.0, breaker=BreakerPolicy(3, pause_s=60))

    async def two():
        return await asked.objects(LR), await asked.objects(LR)

    _, second = asyncio.run(two())
    assert isinstance(second, Failed) and "left alone" in second.reason
    assert len(method.calls) == 3


def test_full_queues_and_refused_requests_never_open_the_breaker():
    for trouble in (OverloadedError("9 wait"), ValueError("bad image")):
        asked = client(Method(trouble), timeout_s=0.5, breaker=BreakerPolicy(1, pause_s=60))
        asyncio.run(asked.objects(LR))
        assert asked.left_alone() == ()


def test_each_server_has_a_breaker_of_its_own():
    measured = Method(RewardServerError("down"))
    asked = client(Method(CAT), measure=measured, breaker=BreakerPolicy(1, pause_s=60))

    async def both():
        return await asked.measure([LR]), await asked.objects(LR)

    failed, found = asyncio.run(both())
    assert isinstance(failed, Failed) and found == CAT and asked.left_alone() == (IQA,)


def test_a_cancelled_request_raises_and_tells_the_server():
    told = []

    class Response:
        def __await__(self):
            return asyncio.sleep(60).__await__()

        def cancel(self):
            told.append(True)

    handle = SimpleNamespace(judge=SimpleNamespace(remote=lambda **_: Response()))
    asked = RewardClient(HandleTransport({QWEN_VL: handle}))

    async def cancel():
        task = asyncio.create_task(asked.judge(LR, [LR], 0))
        await asyncio.sleep(0.01)
        task.cancel()
        await task

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(cancel())
    assert told == [True]
