"""Builders of the reward applications for a Serve configuration file (``serveConfigV2`` of ``k8s/``).

A builder takes ``args: {overrides: "experiment=toy reward..."}``, the overrides of ``rl-system train``. Numbers of
replicas, queues and autoscaling are given in the Serve configuration itself.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ray import serve
from ray.serve import Application

from reward_servers.deploy import GroundedSamReplica, RewardAppSpec, VisualExpertReplica
from reward_servers.qwen_vl import process_environment
from rl_system import assembly
from rl_system.config.compose import load_config
from rl_system.config.schema import TrainConfig


def grounded_sam(args: dict[str, str]) -> Application:
    """Grounded-SAM. Raises ConfigError for bad overrides or missing checkpoints."""
    config = _config(args)
    spec = assembly.detector_app(config)
    return _application(GroundedSamReplica, spec, assembly.detector_config(config), spec.batch_size, spec.batch_wait_s)


def visual_expert(args: dict[str, str]) -> Application:
    """The visual expert. Raises ConfigError for bad overrides or missing checkpoints."""
    config = _config(args)
    expert, spec = assembly.expert_config(config), assembly.expert_app(config)
    options = dict(spec.ray_actor_options)
    variables = process_environment(expert) | options["runtime_env"]["env_vars"]
    options["runtime_env"] = {"env_vars": variables}
    return _application(VisualExpertReplica, replace(spec, ray_actor_options=options), expert)


def _config(args: dict[str, str]) -> TrainConfig:
    return load_config(args["overrides"].split())


def _application(replica: type, spec: RewardAppSpec, *arguments: Any) -> Application:
    decorated: Any = serve.deployment(replica)
    deployment = decorated.options(name=spec.name, ray_actor_options=dict(spec.ray_actor_options))
    return deployment.bind(*arguments)
