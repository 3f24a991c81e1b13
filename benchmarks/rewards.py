"""Reward servers at toy size on this machine: `python -m benchmarks.rewards`.

* Batching: each server with batches against the same server with a batch size of one, both at work in one Serve,
  rounds in turn, sixteen requests at a time. Every image is new to both, so that no cache answers.
* Overhead: what the client, Serve and the object store add to a reward of no duration, per image of 512x512.
* Scaling: seconds from the first request of a load to the second running replica of Grounded-SAM.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import statistics
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import ray
from ray import serve

from benchmarks.figures import machine, output_option, write
from reward_servers.client import RewardClient
from reward_servers.contract import Detection
from reward_servers.deploy import (
    RewardAppSpec,
    custom_app,
    delete_apps,
    deploy,
    grounded_sam_app,
    iqa_app,
    visual_expert_app,
)
from reward_servers.transports import HandleTransport
from rl_system import assembly
from rl_system.config.compose import load_config
from toy.judged_images import SIZE, enlarge
from toy.photographs import crop
from vlcot.groups import Failed

AT_ONCE = 16
Ask = Callable[[RewardClient], Awaitable[Any]]


def fresh_images() -> Iterator[np.ndarray]:
    """Toy photographs uint8 [64, 64, 3], no two alike: a pixel carries the number."""
    photographs = [crop(index, "train", 0, SIZE).image for index in range(256)]
    for number in itertools.count():
        image = photographs[number % len(photographs)].copy()
        image[0, 0] = (number >> 16, (number >> 8) % 256, number % 256)
        yield image


class Aliased(HandleTransport):
    """Asks one application under the name of another: the client knows the servers by their usual names."""

    def __init__(self, server: str, handle: Any) -> None:
        super().__init__({server: handle})


async def requests_per_s(client: RewardClient, ask: Callable[[RewardClient], Awaitable[Any]], count: int) -> float:
    """``count`` requests, AT_ONCE at a time.

    Raises:
        RuntimeError: one failed.
    """
    left = iter(range(count))

    async def ask_on() -> None:
        for _ in left:
            answer = await ask(client)
            if isinstance(answer, Failed):
                raise RuntimeError(answer.reason)

    started = time.perf_counter()
    await asyncio.gather(*(ask_on() for _ in range(AT_ONCE)))
    return count / (time.perf_counter() - started)


def batching(rounds: int, count: int) -> dict[str, Any]:
    """Requests per second, batched and one by one, of each server."""
    config = load_config(["experiment=toy"])
    images = fresh_images()
    spec = RewardAppSpec("", max_ongoing_requests=2 * AT_ONCE, batch_size=8, batch_wait_s=0.005)
    expert, detector = assembly.expert_config(config), assembly.detector_config(config)
    metrics = assembly.iqa_config(load_config(["experiment=toy", "reward=perceptual_offline"]))

    async def detect(client: RewardClient) -> Any:
        return await client.objects(next(images))

    async def judge(client: RewardClient) -> Any:
        group = [next(images) for _ in range(4)]
        return await client.judge(enlarge(group[0][::4, ::4]), group, 0)

    async def measure(client: RewardClient) -> Any:
        group = [next(images) for _ in range(4)]
        return await client.measure(group, group[0])

    def named(name: str, size: int) -> RewardAppSpec:
        return replace(spec, name=name, batch_size=size)

    sides = {
        "grounded_sam": (
            detect,
            grounded_sam_app(detector, named("grounded_sam_batched", 8)),
            grounded_sam_app(detector, named("grounded_sam_single", 1)),
        ),
        "iqa": (
            measure,
            iqa_app(metrics, named("iqa_batched", 8)),
            iqa_app(metrics, named("iqa_single", 1)),
        ),
        "qwen_vl": (
            judge,
            visual_expert_app(replace(expert, max_num_seqs=8), named("qwen_vl_batched", 1)),
            visual_expert_app(replace(expert, max_num_seqs=1), named("qwen_vl_single", 1)),
        ),
    }
    return {
        server: _compare(server, ask, {"batched": batched, "single": single}, rounds, count)
        for server, (ask, batched, single) in sides.items()
    }


def _compare(server: str, ask: Ask, apps: dict[str, Any], rounds: int, count: int) -> dict[str, float]:
    handles = deploy({f"{server}_{side}": app for side, app in apps.items()})
    clients = {side: RewardClient(Aliased(server, handles[f"{server}_{side}"])) for side in apps}

    async def all_rounds() -> list[dict[str, float]]:
        for client in clients.values():
            await requests_per_s(client, ask, AT_ONCE)
        return [{side: await requests_per_s(c, ask, count) for side, c in clients.items()} for _ in range(rounds)]

    rates = asyncio.run(all_rounds())
    delete_apps(*(f"{server}_{side}" for side in apps))
    return {
        "batched_per_s": round(statistics.median(r["batched"] for r in rates), 2),
        "single_per_s": round(statistics.median(r["single"] for r in rates), 2),
        "ratio": round(statistics.median(r["batched"] / r["single"] for r in rates), 2),
    }


def overhead(rounds: int) -> dict[str, float]:
    """Milliseconds per 512x512 image, one at a time and in groups of eight."""
    app = custom_app("benchmarks.slow_reward:SlowReward", {}, RewardAppSpec("nothing"))
    client = RewardClient(HandleTransport(deploy({"nothing": app})))
    rng = np.random.default_rng(0)
    lr = rng.integers(0, 256, (128, 128, 3), np.uint8)
    group = [rng.integers(0, 256, (512, 512, 3), np.uint8) for _ in range(8)]

    async def per_image(images: list[np.ndarray]) -> float:
        times = []
        for _ in range(rounds):
            started = time.perf_counter()
            answer = await client.score("nothing", lr, images)
            times.append((time.perf_counter() - started) / len(images))
            if isinstance(answer, Failed):
                raise RuntimeError(answer.reason)
        return round(1000 * statistics.median(times), 2)

    async def both() -> dict[str, float]:
        await per_image(group[:1])
        return {"alone_ms": await per_image(group[:1]), "in_group_of_8_ms": await per_image(group)}

    found = asyncio.run(both())
    delete_apps("nothing")
    return found


def second_replica() -> dict[str, float]:
    """Seconds until autoscaling, which waits one second here, has a second replica that runs."""
    config = load_config(["experiment=toy"])
    scaling = {
        "min_replicas": 1,
        "max_replicas": 2,
        "target_ongoing_requests": 2,
        "upscale_delay_s": 1.0,
        "metrics_interval_s": 0.5,
        "look_back_period_s": 2.0,
    }
    spec = RewardAppSpec("grounded_sam", autoscaling=scaling)
    app = grounded_sam_app(assembly.detector_config(config), spec)
    client = RewardClient(HandleTransport(deploy({"grounded_sam": app})))
    images = fresh_images()

    async def load() -> float:
        started = time.perf_counter()
        stop = asyncio.Event()

        async def ask_on() -> None:
            while not stop.is_set():
                answer = await client.objects(next(images))
                assert isinstance(answer, Detection)

        asking = [asyncio.create_task(ask_on()) for _ in range(AT_ONCE)]
        while _running() < 2:
            await asyncio.sleep(0.1)
        seconds = time.perf_counter() - started
        stop.set()
        await asyncio.gather(*asking)
        return seconds

    seconds = asyncio.run(load())
    delete_apps("grounded_sam")
    return {"seconds": round(seconds, 1), "of_which_upscale_delay": 1.0}


def _running() -> int:
    states = serve.status().applications["grounded_sam"].deployments["grounded_sam"].replica_states
    return {str(state): count for state, count in states.items()}.get("RUNNING", 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=96)
    output_option(parser, "rewards")
    args = parser.parse_args()
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    os.environ.setdefault("RAY_worker_niceness", "0")
    ray.init(num_cpus=8, include_dashboard=False, log_to_driver=False)
    try:
        figures = {
            "machine": f"{machine()}, ray {ray.__version__}",
            "batching": batching(args.rounds, args.requests),
            "client_overhead_512": overhead(50),
            "second_replica": second_replica(),
        }
    finally:
        serve.shutdown()
        ray.shutdown()
    write(args.output, figures)


if __name__ == "__main__":
    main()
