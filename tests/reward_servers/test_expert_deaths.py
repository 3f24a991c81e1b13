"""The engine of the real expert dies under load. Run with ``-s`` for the recovery time."""

from __future__ import annotations

import asyncio
import os
import signal
import time

import psutil
import pytest
import ray
from ray import serve

from reward_servers.client import RewardClient
from reward_servers.contract import Judgement
from reward_servers.deploy import deploy, visual_expert_app
from reward_servers.transports import HandleTransport
from rl_system import assembly
from rl_system.config.compose import CONFIG_DIR, load_config
from toy.judged_images import enlarge
from toy.photographs import crop
from vlcot.groups import Failed

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

HQ = crop(0, "heldout", 0, 64).image
LR = enlarge(HQ[::4, ::4])
GROUP = [HQ, LR]


@pytest.fixture(scope="module")
def expert():
    os.environ["RAY_AUTH_MODE"] = "disabled"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(CONFIG_DIR.parent)
        config = load_config(["experiment=toy"])
        ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
        try:
            app = visual_expert_app(assembly.expert_config(config), assembly.app_spec(config, "qwen_vl"))
            yield deploy({"qwen_vl": app})["qwen_vl"]
        finally:
            serve.shutdown()
            ray.shutdown()


def engine_of(pid: int) -> int:
    """The vLLM engine's process below a replica's."""
    children = psutil.Process(pid).children(recursive=True)
    (engine,) = [child for child in children if "EngineCore" in " ".join((child.name(), *child.cmdline()))]
    return engine.pid


def test_its_replica_ends_with_it_and_a_new_one_judges_alike_and_every_request_ends(expert):
    client = RewardClient(HandleTransport({"qwen_vl": expert}), timeout_s=150)

    async def pid() -> int:
        return (await expert.ready.remote())["pid"]

    async def story() -> tuple[list[list[Judgement] | Failed], float]:
        before, expected = await pid(), await client.judge(LR, GROUP, 0)
        ended: list[list[Judgement] | Failed] = []
        stop = asyncio.Event()

        async def ask_on() -> None:
            while not stop.is_set():
                ended.append(await client.judge(LR, GROUP, 0))
                await asyncio.sleep(0.05)

        asking = [asyncio.create_task(ask_on()) for _ in range(4)]
        while len(ended) < 8:
            await asyncio.sleep(0.01)
        replica, killed = psutil.Process(before), time.monotonic()
        os.kill(engine_of(before), signal.SIGKILL)
        await asyncio.to_thread(replica.wait, 60)
        count = len(ended)
        while not any(answer == expected for answer in ended[count + len(asking) :]):
            await asyncio.sleep(0.1)
        seconds = time.monotonic() - killed
        stop.set()
        await asyncio.gather(*asking)
        assert await pid() != before
        assert [answer for answer in ended if not isinstance(answer, Failed) and answer != expected] == []
        return ended, seconds

    ended, seconds = asyncio.run(story())
    failed = [answer.reason for answer in ended if isinstance(answer, Failed)]
    print(f"\njudged again after {seconds:.1f} s; {len(ended)} requests, failed: {failed}")
    assert client.stats["qwen_vl"].failures == len(failed)
