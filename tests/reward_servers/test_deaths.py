"""What dies under a steady load of requests, and that every request still ends: scored, or failed with its reason.

A local Ray of three nodes, real Serve, the real client. The model behind the replicas is a stand-in that scores the
mean of an image, so that every answer can be told to be that of its own request; the real models die in
``test_deploy.py``. Run with ``-s`` to see the recovery times.
"""

from __future__ import annotations

import asyncio
import math
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import ray
from ray import serve
from ray.cluster_utils import Cluster
from ray.exceptions import RayActorError

from reward_servers.breaker import BreakerPolicy
from reward_servers.client import RewardClient
from reward_servers.contract import Judgement
from reward_servers.deploy import RewardAppSpec, application, deploy
from reward_servers.retry import RetryPolicy
from reward_servers.transports import HandleTransport
from vlcot.groups import Failed

pytestmark = [pytest.mark.engine, pytest.mark.timeout(400)]

REQUESTS, AT_ONCE = 500, 8
QUICK_TO_NOTICE = {
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 2000,
    "health_check_failure_threshold": 3,
}
LR = np.zeros((2, 2, 3), np.uint8)


class Judges:
    """Scores the value of an image's first pixel; does what the files in ``faults`` say."""

    def __init__(self, faults: str) -> None:
        self._faults = Path(faults)

    def _told(self, fault: str) -> bool:
        return (self._faults / fault).exists() or (self._faults / f"{fault}-{os.getpid()}").exists()

    async def judge(self, lr, images, seed):
        if self._told("hang"):
            await asyncio.sleep(3600)
        if self._told("garbage") and seed % 2:
            return "a very nice picture"
        await asyncio.sleep(0.002)
        value = math.nan if self._told("nan") and seed % 2 else number_of(images[0]) / 100
        return [Judgement(value, value, value)]

    def reconfigure(self, user_config):
        assert user_config == {}

    async def check_health(self) -> None:
        if self._told("sick"):
            raise RuntimeError("told to be sick")

    async def ready(self):
        return {"pid": os.getpid(), "node": ray.get_runtime_context().get_node_id()}


def image_of(number: int) -> np.ndarray:
    return np.full((2, 2, 3), (number // 256, number % 256, 0), np.uint8)


def number_of(image: np.ndarray) -> int:
    return int(image[0, 0, 0]) * 256 + int(image[0, 0, 1])


@pytest.fixture(scope="module")
def cluster():
    os.environ["RAY_AUTH_MODE"] = "disabled"
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # replicas cannot import this file
    made = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 2, "include_dashboard": False, "_system_config": QUICK_TO_NOTICE},
    )
    try:
        for _ in range(2):
            made.add_node(num_cpus=2, labels={"rl.io/pool": "reward-vlm"})
        ray.init(address=made.address, log_to_driver=False)
        made.wait_for_nodes()
        yield made
        serve.shutdown()
    finally:
        ray.shutdown()
        made.shutdown()


@pytest.fixture(scope="module")
def faults(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="module")
def handle(cluster, faults):
    spec = RewardAppSpec(
        "qwen_vl",
        num_replicas=2,
        ray_actor_options={"num_cpus": 1, "label_selector": {"rl.io/pool": "reward-vlm"}},
        max_ongoing_requests=8,
        health_check_period_s=0.5,
        health_check_timeout_s=2.0,
        graceful_shutdown_timeout_s=1.0,
    )
    return deploy({"qwen_vl": application(Judges, spec, str(faults))})["qwen_vl"]


class Load:
    """Five hundred requests, a few at a time, while something happens to the servers."""

    def __init__(self, handle, attempts: int = 12) -> None:
        retry = RetryPolicy(attempts, attempt_timeout_s=2.0, base_delay_s=0.05, max_delay_s=1.0)
        breaker = BreakerPolicy(failures=6, pause_s=0.5)
        self.client = RewardClient(HandleTransport({"qwen_vl": handle}), 60.0, retry, breaker, seed=0)
        self.answers: dict[int, object] = {}
        self.ends: list[tuple[float, bool]] = []
        self.struck_at = math.inf

    async def run(self, strike: Callable[[], Awaitable[None]]) -> None:
        numbers = iter(range(REQUESTS))

        async def ask_on() -> None:
            for number in numbers:
                answer = await self.client.judge(LR, [image_of(number)], number)
                assert number not in self.answers, "answered twice"
                self.answers[number] = answer
                self.ends.append((time.monotonic(), not isinstance(answer, Failed)))

        async def strike_in_the_middle() -> None:
            while len(self.answers) < REQUESTS // 5:
                await asyncio.sleep(0.01)
            self.struck_at = time.monotonic()
            await strike()

        await asyncio.gather(strike_in_the_middle(), *(ask_on() for _ in range(AT_ONCE)))

    def check(self, what: str, least: float = 0.9) -> Counter[str]:
        """Every request ended once, each score is that of its own image; prints the longest gap between answers."""
        assert sorted(self.answers) == list(range(REQUESTS))
        kinds: Counter[str] = Counter()
        for number, answer in self.answers.items():
            if isinstance(answer, Failed):
                assert answer.reason
                kinds["failed"] += 1
            else:
                assert answer == [Judgement(*[number / 100] * 3)]
                kinds["scored"] += 1
        times = [self.struck_at, *(end for end, scored in self.ends if scored and end >= self.struck_at)]
        gap = max(after - before for before, after in pairwise(times))
        stats = self.client.stats["qwen_vl"]
        print(f"\n{what}: {dict(kinds)}, {stats.retries} retries, longest wait for an answer {gap:.2f} s")
        assert kinds["scored"] >= least * REQUESTS
        return kinds


async def replicas(handle) -> dict[int, str]:
    """Node id by process id, of the replicas that answer."""
    found = await asyncio.gather(*(handle.ready.remote() for _ in range(24)), return_exceptions=True)
    for error in found:
        if isinstance(error, BaseException) and not isinstance(error, RayActorError):
            raise error
    return {answer["pid"]: answer["node"] for answer in found if isinstance(answer, dict)}


async def until_two(handle) -> dict[int, str]:
    deadline = time.monotonic() + 60
    while len(now := await replicas(handle)) != 2 or not serving(2):
        assert time.monotonic() < deadline, f"two replicas were to come back, there are {now}"
        await asyncio.sleep(0.2)
    return now


def serving(count: int) -> bool:
    states = serve.status().applications["qwen_vl"].deployments["qwen_vl"].replica_states
    return {str(state): n for state, n in states.items()} == {"RUNNING": count}


def test_a_killed_replica(handle):
    async def story():
        pid = next(iter(await until_two(handle)))

        async def strike():
            os.kill(pid, signal.SIGKILL)

        load = Load(handle)
        await load.run(strike)
        return load, pid, await until_two(handle)

    load, pid, after = asyncio.run(story())
    load.check("SIGKILL of a replica")
    assert pid not in after


def test_a_failing_health_check(handle, faults):
    async def story():
        pid = next(iter(await until_two(handle)))

        async def strike():
            (faults / f"sick-{pid}").touch()
            while pid in await replicas(handle):
                await asyncio.sleep(0.2)

        load = Load(handle)
        await load.run(strike)
        return load, await until_two(handle)

    load, _ = asyncio.run(story())
    assert load.check("failing health check")["failed"] == 0


def test_a_replica_that_hangs_loses_its_requests_to_the_other(handle, faults):
    async def story():
        pid = next(iter(await until_two(handle)))
        told = faults / f"hang-{pid}"

        async def strike():
            told.touch()
            await asyncio.sleep(3)
            told.unlink()

        load = Load(handle)
        await load.run(strike)
        return load

    asyncio.run(story()).check("a replica that hangs")


@pytest.mark.parametrize("nonsense", ["garbage", "nan"])
def test_answers_that_are_none_are_failed_with_their_reason_and_never_a_number(handle, faults, nonsense):
    """For a while every second request gets nonsense, however often it is sent."""

    async def story():
        await until_two(handle)

        async def strike():
            (faults / nonsense).touch()
            await asyncio.sleep(0.5)
            (faults / nonsense).unlink()

        load = Load(handle, attempts=2)
        await load.run(strike)
        return load

    load = asyncio.run(story())
    assert load.check(nonsense, least=0.5)["failed"] > 0
    reasons = {answer.reason for answer in load.answers.values() if isinstance(answer, Failed)}
    said = {"garbage": "no list of Judgements but str", "nan": "lies outside"}[nonsense]
    assert all(said in reason for reason in reasons), reasons


def test_a_drained_node_costs_no_request(cluster, handle):
    async def story():
        node = next(iter((await until_two(handle)).values()))
        cluster.add_node(num_cpus=2, labels={"rl.io/pool": "reward-vlm"})

        async def strike():
            await asyncio.to_thread(drain, cluster.address, node)
            while node in (await replicas(handle)).values():
                await asyncio.sleep(0.2)

        load = Load(handle)
        await load.run(strike)
        return load, node, await until_two(handle)

    load, node, after = asyncio.run(story())
    assert load.check("drain of a node")["failed"] == 0
    assert node not in after.values()


def test_a_lost_node(cluster, handle):
    async def story():
        node = next(iter((await until_two(handle)).values()))
        cluster.add_node(num_cpus=2, labels={"rl.io/pool": "reward-vlm"})
        lost = next(n for n in cluster.worker_nodes if n.node_id == node)

        async def strike():
            cluster.remove_node(lost, allow_graceful=False)

        load = Load(handle)
        await load.run(strike)
        return load, node, await until_two(handle)

    load, node, after = asyncio.run(story())
    load.check("loss of a node")
    assert node not in after.values()


def drain(address: str, node_id: str) -> None:
    """As Kubernetes' preStop hook does (``rl_system.k8s.drain``), for a node of this machine."""
    ray_command = str(Path(sys.executable).with_name("ray"))
    command = [ray_command, "drain-node", "--address", address, "--node-id", node_id]
    command += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "test"]
    command += ["--deadline-remaining-seconds", "60"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stderr
