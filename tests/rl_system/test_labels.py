"""Placement by node label on a real Ray of five local nodes: every kind of process on its own, or refused by name.

Ray would rather use the driver's own node, which has room for nearly all: what lands elsewhere is there for its label.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
import ray
import ray.train
from ray import serve
from ray.cluster_utils import Cluster

import actors.pool
import learners.launch
from reward_servers.deploy import application, deploy
from rl_system import assembly
from rl_system.config.compose import compose_config

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

ROOT = Path(__file__).resolve().parents[2]
POOLS = ("rollout", "learner", "reward-sam", "reward-vlm")
NOWHERE = "{rl.io/pool: nowhere}"


def here() -> str:
    return ray.get_runtime_context().get_node_id()


class Sampler:
    """In the place of a rollout actor."""

    def __init__(self, spec, index):
        self._node = here()

    def ready(self):
        return {"node": self._node}

    def shutdown(self):
        pass


class Server:
    """In the place of a reward server."""

    def reconfigure(self, user_config):
        assert user_config == {}

    def node(self):
        return here()


def write_node(config):
    """In the place of the training loop."""
    rank = ray.train.get_context().get_world_rank()
    (Path(config["loop"].export_path).parent / f"node-{rank}").write_text(here())
    return 0


@pytest.fixture(scope="module")
def nodes():
    """Node ids by pool."""
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import this file
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 4, "include_dashboard": False, "labels": {"rl.io/pool": "head"}},
    )
    try:
        added = {pool: cluster.add_node(num_cpus=2, labels={"rl.io/pool": pool}) for pool in POOLS}
        ray.init(address=cluster.address, log_to_driver=False)
        cluster.wait_for_nodes()
        yield cluster.address, {pool: node.node_id for pool, node in added.items()}
        serve.shutdown()
    finally:
        ray.shutdown()
        cluster.shutdown()


def configured(*overrides):
    return compose_config(["experiment=toy", "cluster=kubernetes", *overrides])


def pool_of(config):
    return actors.pool.RolloutPool(
        assembly.rollout_spec(config), config.rollout.actors, {"CPU": 1}, 180, labels=config.rollout.labels
    )


def test_each_kind_of_process_lands_on_the_nodes_of_its_pool(nodes, tmp_path, monkeypatch):
    _, node_of = nodes
    config = configured("rollout.actors=2", "reward.qwen_vl.autoscaling={min_replicas: 2, max_replicas: 2}")
    assembly.check_resources(config)

    monkeypatch.setattr(actors.pool, "RolloutActor", Sampler)
    rollout = pool_of(config)
    rollout.start()
    assert [info["node"] for info in rollout.ready_info()] == [node_of["rollout"]] * 2

    monkeypatch.setattr(learners.launch, "train_loop", write_node)
    spec = assembly.learner_spec(config)
    group = learners.launch.LearnerGroup(spec, None, None, None, tmp_path, "run", labels=config.learner.labels)
    group.start()
    group.result(timeout=250)
    written = sorted((tmp_path / "run").glob("node-*"))
    assert [file.read_text() for file in written] == [node_of["learner"]] * 2

    for app, pool in ((assembly.detector_app(config), "reward-sam"), (assembly.expert_app(config), "reward-vlm")):
        handle = deploy({app.name: application(Server, app)})[app.name]
        assert {handle.node.remote().result(timeout_s=180) for _ in range(8)} == {node_of[pool]}
    replicas = serve.status().applications["qwen_vl"].deployments["qwen_vl"].replica_states
    assert {str(state): count for state, count in replicas.items()} == {"RUNNING": 2}
    rollout.stop()


@pytest.mark.parametrize(
    ("key", "setting"),
    [
        ("rollout.labels", "rollout.actors=1"),
        ("learner.labels", "learner.ranks=2"),
        ("reward.grounded_sam.labels", "reward.grounded_sam.replicas=1"),
        ("reward.qwen_vl.labels", "reward.qwen_vl.replicas=1"),
    ],
)
def test_a_label_that_no_node_has_is_refused_by_name(nodes, key, setting):
    config = configured(f"{key}={NOWHERE}")
    began = time.monotonic()
    with pytest.raises(ValueError, match=f"cannot place {setting}: no node .* rl.io/pool=nowhere; there is .*=learner"):
        assembly.check_resources(config)
    assert time.monotonic() - began < 60


def test_the_pool_of_actors_refuses_it_too(nodes):
    with pytest.raises(ValueError, match=r"no node of the cluster has the label rl.io/pool=nowhere"):
        pool_of(configured(f"rollout.labels={NOWHERE}")).start()
    with pytest.raises(ValueError, match=r"need 3 CPU; the nodes with rl.io/pool=rollout have 2"):
        pool_of(configured("rollout.actors=3")).start()


def test_only_nodes_with_the_label_are_counted(nodes):
    wanted = r"3 CPU on nodes with rl.io/pool=learner \(learner.ranks=3\), but there are 2"
    with pytest.raises(ValueError, match=wanted):
        assembly.check_resources(configured("learner.ranks=3"))
    shared = configured("rollout.labels={rl.io/pool: learner}")
    wanted = r"3 CPU on nodes with rl.io/pool=learner \(rollout.actors=1, learner.ranks=2\), but there are 2"
    with pytest.raises(ValueError, match=wanted):
        assembly.check_resources(shared)


def test_train_on_the_cluster_ends_at_once_with_2(nodes, tmp_path, monkeypatch):
    address, _ = nodes
    monkeypatch.setenv("RAY_ADDRESS", address)
    settings = ["experiment=toy", "cluster=kubernetes", f"learner.labels={NOWHERE}", f"output_dir={tmp_path}/runs"]
    command = [sys.executable, "-m", "rl_system", "train", *settings]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stderr
    said = done.stderr.strip().splitlines()[-1]
    assert said.startswith(
        "rl-system train: the run cannot place learner.ranks=2: no node of the cluster has the label"
    )
    assert not (tmp_path / "runs").exists()
