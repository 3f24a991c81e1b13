"""What `k8s check` thinks that a run asks Ray for."""

from __future__ import annotations

import pytest
import yaml

from rl_system.config.compose import ConfigError, compose_config
from rl_system.k8s.manifests import Manifest
from rl_system.k8s.placement import _service_requests, training_requests
from rl_system.serve_config import serve_config

pytestmark = pytest.mark.unit

SLOW = 'reward.extra.slow={target: "benchmarks.slow_reward:SlowReward"%s}'


def pools(*overrides: str) -> list[tuple[str, str]]:
    return [(r.what, r.pool) for r in training_requests(compose_config(["experiment=toy", *overrides]), "min")]


def test_a_run_that_asks_servers_outside_needs_no_pool_for_them():
    own = [("rollout actor", "rollout"), ("learner rank", "learner")]
    assert pools() == [*own, ("grounded_sam replica", "reward-sam"), ("qwen_vl replica", "reward-vlm")]
    assert pools("reward.url=http://rewards:8000") == own


def test_a_reward_of_ones_own_says_its_pool():
    labelled = "+" + SLOW % ", labels: {rl.io/pool: reward-sam}"
    assert pools(labelled)[-1] == ("slow replica", "reward-sam")
    with pytest.raises(ConfigError, match=r"choose one by reward.extra.slow.labels={rl.io/pool: reward-sam}"):
        pools("+" + SLOW % "")


def test_overrides_with_spaces_are_read_as_serve_rewards_wrote_them():
    overrides = ["experiment=toy", "reward.grounded_sam.vocabulary=[cat, coin]", "reward.grounded_sam.num_cpus=2"]
    config = serve_config(compose_config(overrides), overrides, "127.0.0.1", 8000)
    manifest = Manifest({"kind": "RayService", "spec": {"serveConfigV2": yaml.safe_dump(config)}}, "service.yaml")
    first, _ = _service_requests(manifest)
    assert first.what == "grounded_sam replica" and first.resources["CPU"] == 2
