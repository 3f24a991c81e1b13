"""From the configuration to what Ray and Serve are asked for."""

from __future__ import annotations

import pytest

from rl_system import assembly
from rl_system.config.compose import compose_config, to_yaml

pytestmark = pytest.mark.unit


def test_the_toy_goes_anywhere_with_a_fixed_number_of_replicas():
    config = compose_config(["experiment=toy", "reward.qwen_vl.replicas=3"])
    assert {str(dict(d.labels)) for d in assembly.demands(config)} == {"{}"}
    expert = assembly.expert_app(config)
    assert expert.ray_actor_options["label_selector"] == {}
    assert (expert.num_replicas, expert.autoscaling) == (3, None)
    assert {d.setting: d.count for d in assembly.demands(config)}["reward.qwen_vl.replicas"] == 3


def test_serve_takes_labels_and_autoscaling_as_they_are_written():
    from ray.serve.config import AutoscalingConfig
    from ray.serve.schema import RayActorOptionsSchema

    overrides = ["reward.grounded_sam.autoscaling={max_replicas: 4, target_ongoing_requests: 2, upscale_delay_s: 5}"]
    config = compose_config(["experiment=toy", "cluster=kubernetes", *overrides])
    sam, expert = assembly.detector_app(config), assembly.expert_app(config)
    scaling = AutoscalingConfig(**sam.autoscaling)
    assert (scaling.min_replicas, scaling.max_replicas, scaling.target_ongoing_requests) == (1, 4, 2)
    assert (scaling.upscale_delay_s, scaling.downscale_delay_s) == (5, 600)
    assert set(sam.autoscaling) <= set(AutoscalingConfig.model_fields)
    assert expert.autoscaling is None
    for app, pool in ((sam, "reward-sam"), (expert, "reward-vlm")):
        options = RayActorOptionsSchema(**app.ray_actor_options)
        assert options.label_selector == {"rl.io/pool": pool}


def test_labels_are_in_the_resolved_configuration_of_the_run():
    assert "rl.io/pool: reward-vlm" in to_yaml(compose_config(["experiment=toy", "cluster=kubernetes"]))
