"""What a replica keeps to itself: answers of other settings, and a user's class that is called by one thread."""

from __future__ import annotations

import asyncio
import threading
import time

import numpy as np
import pytest

from reward_servers.replicas import CustomReplica, GroundedSamReplica
from rl_system import assembly
from rl_system.config.compose import CONFIG_DIR, compose_config
from toy.detection_examples import scene_examples

pytestmark = pytest.mark.unit

PICTURE = np.zeros((4, 4, 3), np.uint8)


def test_settings_that_change_while_a_request_waits_leave_no_wrong_answer_behind(monkeypatch):
    monkeypatch.chdir(CONFIG_DIR.parent)
    image = scene_examples(1, "heldout")[0].image

    async def scenario():
        replica = GroundedSamReplica(assembly.detector_config(compose_config(["experiment=toy"])), 2, 0.05)
        replica.reconfigure({})
        waiting = asyncio.create_task(replica.objects(image))
        await asyncio.sleep(0.01)
        replica.reconfigure({"box_threshold": 0.99})
        strict = await waiting
        replica.reconfigure({})
        usual = await replica.objects(image)
        again = await replica.objects(image)
        return strict, usual, again, (await replica.ready())["cached"]

    strict, usual, again, cached = asyncio.run(scenario())
    assert strict.objects == () and usual.objects and again == usual and cached == 1


class Slow:
    """A reward that notices a second thread."""

    inside = 0
    together = 0

    def score(self, lr, images):
        Slow.inside += 1
        Slow.together = max(Slow.together, Slow.inside)
        time.sleep(0.05)
        Slow.inside -= 1
        return [float(threading.current_thread() is threading.main_thread())] * len(images)


def test_a_caller_that_gives_up_lets_no_second_thread_in():
    async def scenario():
        replica = CustomReplica(f"{__name__}:Slow", {}, ".")
        for _ in range(3):
            given_up = asyncio.create_task(replica.score(PICTURE, [PICTURE]))
            await asyncio.sleep(0.01)
            given_up.cancel()
        return await replica.score(PICTURE, [PICTURE, PICTURE])

    assert asyncio.run(scenario()) == [0.0, 0.0]
    assert Slow.together == 1
