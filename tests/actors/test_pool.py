"""The pool on a real Ray with a real engine: push by broadcast over gloo, death, restart, re-issue, push again."""

from __future__ import annotations

import asyncio
import os
import pickle
import signal

import numpy as np
import psutil
import pytest
import ray

from actors.pool import RolloutPool
from tests.actors.conftest import layout_of, learner_logprobs, lively_policy
from tests.processes import alive
from vlcot.weights import checksums, pack

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def cluster():
    os.environ.update(RAY_AUTH_MODE="disabled", RAY_TRAIN_V2_ENABLED="1")
    ray.init(address="local", num_cpus=2, include_dashboard=False, object_store_memory=200 * 2**20, log_to_driver=False)
    yield
    ray.shutdown()


def test_an_impossible_request_is_refused_at_once(cluster, checkpoints):
    with pytest.raises(ValueError, match=r"3 rollout actors with 1 CPU each need 3 CPU; the whole cluster has 2"):
        RolloutPool(checkpoints.spec(), 3).start()
    with pytest.raises(ValueError, match="GPU"):
        RolloutPool(checkpoints.spec(), 1, {"GPU": 1}).start()


def test_a_missing_checkpoint_ends_the_start(cluster, checkpoints, tmp_path):
    with pytest.raises(ValueError, match="no checkpoint at"):
        RolloutPool(checkpoints.spec(policy=str(tmp_path)), 1).start()


def push(sink, version, model):
    tensors = dict(model.named_parameters())
    layout = layout_of(model)
    sink.begin(version, layout)
    for index, bucket in enumerate(layout):
        sink.send(index, pack(bucket, tensors))
    return sink.finish(checksums(tensors.items()))


def test_pool_survives_the_death_of_its_actor(cluster, checkpoints, tmp_path):
    """The restarted actor has the pushed weights, not those on disk, before it writes the same group again."""
    pool = RolloutPool(checkpoints.spec(), 1, start_timeout_s=600)
    pool.start()
    try:
        asyncio.run(life_and_death(pool, checkpoints, lively_policy(tmp_path / "other", seed=1)))
    finally:
        pool.stop()


async def life_and_death(pool, checkpoints, other):
    info = pool.ready_info()[0]
    assert info["weight_version"] == 0 and info["actor"] == "rollout-0" and info["pid"] != os.getpid()
    prompt = checkpoints.prompt(seed=21)
    sink = pickle.loads(ray.cloudpickle.dumps(pool.weight_sink("gloo")))
    report = await asyncio.to_thread(push, sink, 1, other)
    assert report.version == 1 and report.receivers == 1
    assert set(report.seconds) == {"transfer", "verify", "pause", "load", "resume"}
    assert report.nbytes == sum(p.numel() * 4 for p in other.parameters())
    before = await pool.generate(prompt)

    children = psutil.Process(info["pid"]).children(recursive=True)
    assert children
    task = asyncio.create_task(pool.generate(prompt))
    await asyncio.sleep(0.1)
    os.kill(info["pid"], signal.SIGKILL)
    after = await task

    assert all(np.array_equal(a.ids, b.ids) for a, b in zip(before.samples, after.samples, strict=True))
    assert {span.version for sample in after.samples for span in sample.versions} == {1}
    learner = learner_logprobs(other, checkpoints.family, prompt, after.samples[0], 0.9)
    assert np.abs(learner - after.samples[0].logprobs).max() < 1e-5
    assert not [child for child in children if alive(child)]
    statistics = await pool.statistics()
    assert statistics["failures"] == 1 and statistics["healthy"] == 1 and statistics["outstanding"] == 0
    assert statistics["per_actor"][0]["weight_version"] == 1

    report = await asyncio.to_thread(push, sink, 2, checkpoints.model)  # the process that came back is a new member
    assert (report.version, report.receivers) == (2, 1)
    again = await pool.generate(prompt)
    learner = learner_logprobs(checkpoints.model, checkpoints.family, prompt, again.samples[0], 0.9)
    assert np.abs(learner - again.samples[0].logprobs).max() < 1e-5

    # The engine alone dies: the actor says so and is restarted; with one try the prompt fails by name.
    pool._max_tries = 1
    pid = (await pool.handles()[0].ready.remote())["pid"]
    task = asyncio.create_task(pool.generate(prompt))
    await asyncio.sleep(0.1)
    (engine,) = [child for child in psutil.Process(pid).children() if child.name().startswith("VLLM::Engine")]
    engine.kill()
    with pytest.raises(RuntimeError, match="row0 failed on 1 actors: actor 0: EngineLostError"):
        await task
    assert (await pool.statistics())["healthy"] == 0
