"""What the weight sink does about a learner that goes on from its checkpoint, and about an engine that is dead."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest

from actors import weight_sink, weight_store
from actors.errors import EngineLostError
from actors.push import LoadReport
from actors.weight_sink import PHASES, ActorWeightSink
from actors.weight_store import WeightStore
from vlcot.weights import TensorSpec, plan_buckets

pytestmark = pytest.mark.unit

LAYOUT = plan_buckets([TensorSpec("a", (2,), "float32")], 8)
SUMS = {"a": 7}


class Actor:
    """Takes every push at once."""

    def __init__(self):
        self.served, self.buckets = 0, 0

    def begin(self, version, layout):
        pass

    def fetch(self, version, index, stored):
        assert len(stored()) == 1
        self.buckets += 1

    def finish(self, version, checksums):
        self.served = version
        return LoadReport(version, checksums, 1, dict.fromkeys(PHASES, 0.1))


class Handle:
    """What it returns for a reference makes the call."""

    def __init__(self, served):
        self._served = served

    def __getattr__(self, name):
        return SimpleNamespace(remote=lambda *args: partial(getattr(self._served, name), *args))


class DeadEngine(Actor):
    """The actor answers; its engine does not."""

    def finish(self, version, checksums):
        raise EngineLostError("rollout-0: the vLLM engine died")


@pytest.fixture(autouse=True)
def references(monkeypatch):
    """Calls are made when they are asked for."""
    monkeypatch.setattr(weight_sink, "ray", SimpleNamespace(get=lambda call, timeout: call()))
    monkeypatch.setattr(weight_store, "ray", SimpleNamespace(put=lambda data: data))


def push_by_new_learner(version, store, *actors):
    sink = ActorWeightSink([Handle(actor) for actor in actors], Handle(store))
    sink.begin(version, LAYOUT)
    sink.send(0, np.zeros(8, np.uint8))
    return sink.finish(SUMS)


def test_an_actor_whose_engine_died_is_left_out_of_the_push():
    """The learner is not at fault; the pool sees to the actor at its next prompt."""
    actor, store = Actor(), WeightStore()
    report = push_by_new_learner(1, store, DeadEngine(), actor)
    assert (report.receivers, actor.served, store.version()) == (1, 1, 1)


def test_weights_older_than_those_served_go_nowhere():
    actor, store = Actor(), WeightStore()

    def push(version):
        return push_by_new_learner(version, store, actor)

    assert push(3).receivers == 1 and (actor.served, actor.buckets, store.version()) == (3, 1, 3)
    for older in (1, 2):
        report = push(older)
        assert (report.version, report.receivers, report.nbytes) == (3, 0, 0)
    assert (actor.served, actor.buckets, store.version()) == (3, 1, 3) and store.latest().checksums == SUMS
    for version in (3, 4):  # the same step trained again: its weights may differ in the last bits
        assert push(version).version == version and store.version() == actor.served == version
    assert actor.buckets == 3
