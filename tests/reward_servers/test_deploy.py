"""Grounded-SAM behind a real Ray Serve on a local Ray: equal scores, batches, bad input, a killed replica."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
import time

import numpy as np
import pytest
import ray
from ray import serve

from reward_servers.client import GROUNDED_SAM, QWEN_VL, RewardClient
from reward_servers.contract import Detection, Judgement, RewardServerError
from reward_servers.deploy import RewardAppSpec, application, delete_apps, deploy, grounded_sam_app, iqa_app
from reward_servers.grounded_sam import GroundedSam, GroundedSamConfig
from reward_servers.iqa import Iqa, IqaConfig
from reward_servers.replicas import fetched
from reward_servers.retry import RetryPolicy
from reward_servers.transports import HandleTransport
from toy.detection_examples import degraded, scene_examples
from toy.photographs import object_names
from toy.train_grounding_dino import WEIGHTS as GROUNDING_DINO
from toy.train_sam import WEIGHTS as SAM
from vlcot.groups import Failed

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]

CONFIG = GroundedSamConfig(str(GROUNDING_DINO), str(SAM), tuple(object_names()))
METRICS = IqaConfig(("PSNR", "SSIM"))
SPEC = RewardAppSpec("grounded_sam", health_check_period_s=1.0, batch_wait_s=0.05)


class Judges:
    """A replica with the expert's interface: scores by mean brightness, and dies of a negative seed."""

    def reconfigure(self, user_config):
        assert user_config == {}

    async def judge(self, lr, images, seed):
        if seed < 0:
            os._exit(1)
        shown = [await fetched(image) for image in images]
        return [Judgement(*[float(image.mean() / 25.5)] * 3) for image in shown]


class SlowStart:
    """A model that takes long to load."""

    def __init__(self):
        time.sleep(30)

    def reconfigure(self, user_config):
        """Nothing to change."""


@pytest.fixture(scope="module")
def apps():
    os.environ["RAY_AUTH_MODE"] = "disabled"
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # replicas cannot import this file
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    try:
        yield deploy(
            {
                "grounded_sam": grounded_sam_app(CONFIG, SPEC),
                "qwen_vl": application(Judges, RewardAppSpec("qwen_vl", health_check_period_s=1.0)),
                "iqa": iqa_app(METRICS, RewardAppSpec("iqa", batch_wait_s=0.05)),
            }
        )
    finally:
        serve.shutdown()
        ray.shutdown()


@pytest.fixture(scope="module")
def images():
    scenes = scene_examples(8, "heldout")
    return [e.image for e in scenes[:4]] + [e.image for e in degraded(scenes, 0)[4:]]


def test_served_scores_equal_a_direct_call_exactly(apps, images):
    direct, client = GroundedSam(CONFIG), RewardClient(HandleTransport(apps))

    async def one_by_one():
        return [await client.objects(image) for image in images]

    served = asyncio.run(one_by_one())
    assert served == [direct.detect([image])[0] for image in images]
    assert sum(len(answer.objects) for answer in served) >= 4
    assert client.stats[GROUNDED_SAM].count == len(images) and client.stats[GROUNDED_SAM].failures == 0


def test_requests_that_come_together_get_the_same_answers(apps, images):
    direct, client = GroundedSam(CONFIG), RewardClient(HandleTransport(apps))

    async def at_once():
        return await asyncio.gather(*map(client.objects, images))

    for image, answer in zip(images, asyncio.run(at_once()), strict=True):
        alone = direct.detect([image])[0]
        assert [o.name for o in answer.objects] == [o.name for o in alone.objects]
        assert [o.score for o in answer.objects] == pytest.approx([o.score for o in alone.objects], abs=1e-5)


def test_an_image_may_come_as_an_object_reference(apps, images):
    handle = apps["grounded_sam"]

    async def by_reference():
        return await handle.objects.remote(ray.put(images[0])), await handle.objects.remote(images[0])

    first, second = asyncio.run(by_reference())
    assert isinstance(first, Detection) and first == second


def test_a_large_group_travels_by_reference_and_unchanged(apps):
    big = [np.full((256, 256, 3), value, np.uint8) for value in (0, 51, 255)]
    answer = asyncio.run(RewardClient(HandleTransport(apps)).judge(big[0], big, 0))
    assert answer == [Judgement(v, v, v) for v in (0.0, 2.0, 10.0)]


def test_a_bad_image_fails_alone_at_once_and_with_its_reason(apps, images):
    client = RewardClient(HandleTransport(apps))
    bad = images[0].astype(np.float32)

    async def together():
        return await asyncio.gather(client.objects(bad), *map(client.objects, images[:3]))

    refused, *others = asyncio.run(together())
    assert isinstance(refused, Failed) and "uint8 [H, W, 3], got float32" in refused.reason
    assert all(isinstance(answer, Detection) for answer in others)
    assert client.stats[GROUNDED_SAM].retries == 0


def test_a_killed_replica_is_replaced_and_every_request_ends(apps, images):
    client = RewardClient(
        HandleTransport(apps), timeout_s=120, retry=RetryPolicy(attempts=40, base_delay_s=0.5, max_delay_s=2.0)
    )
    pid = asyncio.run(_pid(apps["grounded_sam"]))

    async def under_load():
        requests = [asyncio.create_task(client.objects(image)) for image in images]
        await asyncio.sleep(0.02)
        os.kill(pid, signal.SIGKILL)
        return await asyncio.gather(*requests)

    answers = asyncio.run(under_load())
    assert len(answers) == len(images)
    assert all(isinstance(answer, Detection | Failed) for answer in answers)
    assert isinstance(asyncio.run(client.objects(images[0])), Detection)
    assert asyncio.run(_pid(apps["grounded_sam"])) != pid


def test_a_server_that_dies_at_every_request_ends_in_failed(apps, images):
    client = RewardClient(HandleTransport(apps), timeout_s=20, retry=RetryPolicy(attempts=2, base_delay_s=0.1))
    answer = asyncio.run(client.judge(images[0], images[:2], -1))
    assert isinstance(answer, Failed) and answer.reason.startswith("qwen_vl")
    assert client.stats[QWEN_VL].failures == 1


def test_served_metrics_equal_a_direct_call_exactly(apps, images):
    direct, client = Iqa(METRICS), RewardClient(HandleTransport(apps))
    requests = [([image, image[::-1].copy()], image) for image in images]

    async def at_once():
        return await asyncio.gather(*(client.measure(*request) for request in requests))

    assert asyncio.run(at_once()) == direct.measure(requests)


def test_names_and_masks_come_with_a_request(apps, images):
    direct, client = GroundedSam(CONFIG), RewardClient(HandleTransport(apps))

    async def ask():
        return await client.objects(images[0], names=("cat", "cup"), masks=True), await client.objects(images[0])

    named, usual = asyncio.run(ask())
    assert [named] == direct.detect([images[0]], masks=True, names=[("cat", "cup")])
    assert all(item.mask.shape == images[0].shape[:2] for item in named.objects)
    assert {item.name for item in named.objects} <= {"cat", "cup"}
    assert all(item.mask is None for item in usual.objects)


def test_an_application_that_cannot_start_says_why(apps):
    missing = GroundedSamConfig("/none/such", str(SAM), ("cat",))
    with pytest.raises(RewardServerError, match=r"broken did not start: .*cannot load '/none/such'"):
        deploy({"broken": grounded_sam_app(missing, RewardAppSpec("broken"))})
    delete_apps("broken")
    assert "broken" not in serve.status().applications


def test_a_start_that_is_no_longer_wanted_ends_and_leaves_nothing(apps):
    stop = threading.Event()
    threading.Timer(0.3, stop.set).start()
    with pytest.raises(RewardServerError, match="stopped while they started"):
        deploy({"unwanted": application(SlowStart, RewardAppSpec("unwanted"))}, stop=stop)
    assert "unwanted" not in serve.status().applications
    with pytest.raises(RewardServerError, match=r"not all .* run after 0\.3 s: unwanted is DEPLOYING"):
        deploy({"unwanted": application(SlowStart, RewardAppSpec("unwanted"))}, timeout_s=0.3)
    delete_apps("unwanted")


async def _pid(handle) -> int:
    return (await handle.ready.remote())["pid"]
