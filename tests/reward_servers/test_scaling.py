"""Load on one server scales it, inside its pool of nodes, and leaves the other server as it was.

A local Ray of three nodes and real Serve autoscaling, with stand-ins for the models (``make bench-rewards`` scales the
real detector). Run with ``-s`` to see how long it took and the other server's latencies.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import sys
import time

import numpy as np
import pytest
import ray
from ray import serve
from ray.cluster_utils import Cluster

from reward_servers.client import RewardClient
from reward_servers.contract import DetectedObject, Detection, Judgement
from reward_servers.deploy import RewardAppSpec, application, deploy
from reward_servers.transports import HandleTransport

pytestmark = [pytest.mark.engine, pytest.mark.timeout(400)]

IMAGE = np.zeros((4, 4, 3), np.uint8)
BY_LOAD = {
    "min_replicas": 1,
    "max_replicas": 3,
    "target_ongoing_requests": 2,
    "upscale_delay_s": 1.0,
    "downscale_delay_s": 2.0,
    "metrics_interval_s": 0.2,
    "look_back_period_s": 1.0,
}


class Server:
    """In the place of both models; the detector takes its time."""

    def reconfigure(self, user_config):
        assert user_config == {}

    async def objects(self, image, names=None, masks=False):
        await asyncio.sleep(0.2)
        return Detection((DetectedObject("cat", 0.9, (0.0, 0.0, 1.0, 1.0), 0.5),), ("cat",))

    async def judge(self, lr, images, seed):
        return [Judgement(5.0, 5.0, 5.0)] * len(images)

    async def ready(self):
        return {"pid": os.getpid(), "node": ray.get_runtime_context().get_node_id()}


@pytest.fixture(scope="module")
def pools():
    """Node ids by pool, and the handles."""
    os.environ["RAY_AUTH_MODE"] = "disabled"
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # replicas cannot import this file
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    try:
        nodes = {
            "reward-sam": cluster.add_node(num_cpus=3, labels={"rl.io/pool": "reward-sam"}),
            "reward-vlm": cluster.add_node(num_cpus=3, labels={"rl.io/pool": "reward-vlm"}),
        }
        ray.init(address=cluster.address, log_to_driver=False)
        cluster.wait_for_nodes()
        yield {pool: node.node_id for pool, node in nodes.items()}
        serve.shutdown()
    finally:
        ray.shutdown()
        cluster.shutdown()


def placed(pool: str, cpus: float) -> dict:
    return {"num_cpus": cpus, "label_selector": {"rl.io/pool": pool}}


def running(name: str) -> int:
    states = serve.status().applications[name].deployments[name].replica_states
    return {str(state): count for state, count in states.items()}.get("RUNNING", 0)


def test_load_takes_the_detector_to_three_replicas_and_back_and_the_expert_stays(pools):
    sam = RewardAppSpec("grounded_sam", autoscaling=BY_LOAD, ray_actor_options=placed("reward-sam", 1))
    vlm = RewardAppSpec("qwen_vl", ray_actor_options=placed("reward-vlm", 1))
    handles = deploy({"grounded_sam": application(Server, sam), "qwen_vl": application(Server, vlm)})
    client = RewardClient(HandleTransport(handles))
    latencies: dict[str, list[float]] = {"before": [], "under load": []}
    experts = set()

    async def ask_expert(when: str) -> None:
        started = time.perf_counter()
        assert await client.judge(IMAGE, [IMAGE], 0) == [Judgement(5.0, 5.0, 5.0)]
        latencies[when].append(time.perf_counter() - started)
        experts.add((await handles["qwen_vl"].ready.remote())["pid"])

    async def load(stop: asyncio.Event) -> None:
        while not stop.is_set():
            assert isinstance(await client.objects(IMAGE), Detection)

    async def until(count: int) -> float:
        started = time.monotonic()
        while running("grounded_sam") != count:
            assert time.monotonic() - started < 60, f"{running('grounded_sam')} replicas, not {count}"
            await ask_expert("under load")
            await asyncio.sleep(0.1)
        return time.monotonic() - started

    async def answers_of(count: int) -> list[dict]:
        """Answers until as many replicas gave one: a handle hears of a new replica some time after the controller."""
        started, places = time.monotonic(), []
        while len({place["pid"] for place in places}) < count:
            assert time.monotonic() - started < 60, places
            places += await asyncio.gather(*(handles["grounded_sam"].ready.remote() for _ in range(10)))
        return places

    async def story() -> None:
        for _ in range(20):
            await ask_expert("before")
        stop = asyncio.Event()
        asking = [asyncio.create_task(load(stop)) for _ in range(12)]
        up = await until(3)
        places = await answers_of(3)
        stop.set()
        await asyncio.gather(*asking)
        down = await until(1)
        medians = {when: f"{1000 * statistics.median(found):.1f} ms" for when, found in latencies.items()}
        print(f"\n1 to 3 replicas in {up:.1f} s, back in {down:.1f} s; the expert's median latency: {medians}")
        assert {place["node"] for place in places} == {pools["reward-sam"]}
        assert len({place["pid"] for place in places}) == 3

    asyncio.run(story())
    assert len(experts) == 1 and running("qwen_vl") == 1
    assert client.stats["grounded_sam"].failures == client.stats["qwen_vl"].failures == 0
