"""Broadcast pushes over gloo: a group of threads first, then of Ray actors without an engine."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import ray
import torch

from actors import pool as pool_module
from actors.errors import PushLostError
from actors.pool import RolloutPool
from actors.push import IncomingPush
from actors.push_group import PushGroup, Seat, Sender, receive_all
from tests.actors.no_engine import NoEngine
from vlcot.weights import TensorSpec, checksums, pack, plan_buckets

NAMES = tuple("abcdefgh")
LAYOUT = plan_buckets([TensorSpec(name, (300, 100), "float32") for name in NAMES], 240_000)
HERE = "127.0.0.1"


def tensors(version: int) -> dict[str, torch.Tensor]:
    """Of so many values that a bucket is more than a socket holds at once."""
    generator = torch.Generator().manual_seed(version)
    return {name: torch.randn(300, 100, generator=generator) for name in NAMES}


class Members:
    """Members of a group as threads."""

    def __init__(self) -> None:
        self.threads = ThreadPoolExecutor(4)
        self.joined: list = []

    def call(self, seats: list[Seat | None]) -> None:
        if seats[0] is not None:
            self.joined = [self.threads.submit(PushGroup, seat) for seat in seats]


@pytest.fixture
def members() -> Iterator[Members]:
    members = Members()
    yield members
    members.threads.shutdown(cancel_futures=True)


@pytest.mark.unit
def test_what_is_broadcast_arrives_at_every_member(members, tmp_path) -> None:
    sender, sent = Sender("gloo", HERE, 10.0), tensors(1)
    sender.gather(["one", "two"], members.call)
    pushes = [IncomingPush(1, LAYOUT) for _ in members.joined]
    taken = [members.threads.submit(receive_all, g.result(), p) for g, p in zip(members.joined, pushes, strict=True)]
    for bucket in LAYOUT:
        sender.send(pack(bucket, sent))
    for future, push in zip(taken, pushes, strict=True):
        future.result()
        assert push.check(checksums(sent.items())) == checksums(sent.items())
        push.discard()
    first = members.joined
    sender.gather(["one", "two"], members.call)
    assert members.joined is first, "the same membership keeps its group"
    sender.gather(["one"], members.call)
    assert [future.result().seat.name for future in (*first, *members.joined)] == ["push-1", "push-1", "push-2"]
    sender.close()


@pytest.mark.engine
def test_a_dead_member_ends_the_push_at_once_and_nobody_waits_for_those_in_the_broken_group(members) -> None:
    sender, large = Sender("gloo", HERE, 4.0), np.ones(50_000_000, np.uint8)
    sender.gather(["one", "two"], members.call)
    survivor, victim = (future.result() for future in members.joined)
    first = members.threads.submit(survivor.receive, large.size)
    started = time.monotonic()
    victim.close()
    while sender.open:
        sender.send(large)
    sender.gather(["one"], members.call)
    again = members.threads.submit(members.joined[0].result().receive, large.size)
    sender.send(large)
    assert again.result().sum() == large.size and time.monotonic() - started < 3
    with pytest.raises(PushLostError, match="push-1 of 3 broke"):
        first.result()
        survivor.receive(large.size)
    sender.close()


@pytest.mark.engine
def test_a_silent_or_missing_member_breaks_the_group_within_the_time_out(members, caplog) -> None:
    sender = Sender("gloo", HERE, 1.0)
    sender.gather(["one", "two"], members.call)
    groups, started = [future.result() for future in members.joined], time.monotonic()
    large = np.zeros(50_000_000, np.uint8)
    while sender.open and time.monotonic() < started + 5:  # nobody receives; what a socket holds counts as sent
        sender.send(large)
    assert not sender.open and "push-1 of 3 broke" in caplog.text
    sender.send(large)  # a broken group is left alone
    with pytest.raises(PushLostError, match="push group push-1 of 3 broke"):
        groups[0].receive(10)
    groups[1].close()
    with pytest.raises(PushLostError, match="push-1 is closed"):
        groups[1].receive(10)
    sender.gather(["one", "two"], lambda seats: members.call(seats[:1]))
    assert not sender.open and "push-2 of 3 could not be formed" in caplog.text
    with pytest.raises(PushLostError, match="could not be formed"):
        members.joined[0].result()
    with pytest.raises(PushLostError, match="no push group"):
        receive_all(None, SimpleNamespace(version=3))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def pool() -> Iterator[RolloutPool]:
    """Two actors that have all of a rollout actor but the engine."""
    os.environ.update(RAY_AUTH_MODE="disabled", RAY_worker_niceness="0")
    ray.init(address="local", num_cpus=2, include_dashboard=False, object_store_memory=200 * 2**20, log_to_driver=False)
    patched = pytest.MonkeyPatch()
    patched.setattr(pool_module, "RolloutActor", NoEngine)
    patched.setattr(pool_module, "process_environment", lambda spec: {"OMP_NUM_THREADS": "1"})
    pool = RolloutPool(SimpleNamespace(), 2, start_timeout_s=120)  # type: ignore[arg-type]
    pool.start()
    yield pool
    pool.stop()
    patched.undo()
    ray.shutdown()


def push(sink, version: int, *, claimed: int | None = None):
    """Push the tensors of ``version``, with the checksums of ``claimed``."""
    sent = tensors(version)
    sink.begin(version, LAYOUT)
    for index, bucket in enumerate(LAYOUT):
        sink.send(index, pack(bucket, sent))
    return sink.finish(checksums(tensors(claimed or version).items()))


def served(pool: RolloutPool) -> list[tuple[int, dict[str, int]]]:
    """Version and checksums of each actor."""
    return ray.get([handle.served.remote() for handle in pool.handles()])


@pytest.mark.engine
@pytest.mark.timeout(300)
def test_a_member_that_dies_in_the_middle_and_comes_back(pool) -> None:
    """The learner goes on; the survivor keeps its weights until the pool brings it the push, then all meet again."""
    sink = ray.cloudpickle.loads(ray.cloudpickle.dumps(pool.weight_sink("gloo")))
    sink._bucket_timeout_s = 20.0
    report = push(sink, 1)
    expected = {version: checksums(tensors(version).items()) for version in (1, 2, 3, 4)}
    assert (report.version, report.receivers) == (1, 2)
    assert served(pool) == [(1, expected[1])] * 2
    with pytest.raises(RuntimeError, match="refused weights 2: tensor a: the checksum of what arrived"):
        push(sink, 2, claimed=3)
    assert served(pool) == [(1, expected[1])] * 2

    victim = pool.handles()[1]
    ray.get(victim.die_at.remote(1))
    started = time.monotonic()
    report = push(sink, 3)
    assert time.monotonic() - started < 10, "a dead member ends a broadcast, not its time-out"
    assert (report.version, report.receivers) == (3, 0)
    assert ray.get(pool.handles()[0].served.remote()) == (1, expected[1])

    async def recovery() -> None:
        prompts = [SimpleNamespace(row_id="row", seed=seed) for seed in range(4)]
        assert await asyncio.gather(*(pool.generate(prompt) for prompt in prompts)) == [3] * 4
        while (await pool.statistics())["healthy"] < 2:
            await asyncio.sleep(0.2)

    asyncio.run(asyncio.wait_for(recovery(), 120))
    assert served(pool) == [(3, expected[3])] * 2
    report = push(sink, 4)
    assert (report.version, report.receivers) == (4, 2)
    assert served(pool) == [(4, expected[4])] * 2
