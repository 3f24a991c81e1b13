"""Reward applications of a configuration: those that a run starts, and builders for a Serve configuration file.

A builder (for ``serveConfigV2`` of ``k8s/`` and ``rl-system serve-rewards``) takes the overrides of ``rl-system
train`` as a shell would quote them: ``args: {overrides: "experiment=toy ..."}``.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable

from ray.serve import Application

from reward_servers.client import GROUNDED_SAM, IQA, QWEN_VL
from reward_servers.deploy import (
    RewardAppSpec,
    custom_app,
    grounded_sam_app,
    iqa_app,
    visual_expert_app,
    with_environment,
)
from rl_system import assembly
from rl_system.config.compose import load_config
from rl_system.config.schema import TrainConfig
from rl_system.config.servers import own_servers
from rl_system.runs.worker_logs import RUN_VARIABLE


def applications(config: TrainConfig) -> dict[str, Application]:
    """The applications that a run of ``config`` starts, by name."""
    return {name: _BUILD[name](config) if name in _BUILD else _extra(config, name) for name in own_servers(config)}


def grounded_sam(args: dict[str, str]) -> Application:
    """Grounded-SAM. Raises ConfigError for bad overrides or missing checkpoints."""
    config = _config(args)
    return grounded_sam_app(assembly.detector_config(config), assembly.detector_app(config), http=True)


def visual_expert(args: dict[str, str]) -> Application:
    """The visual expert. Raises ConfigError for bad overrides or missing checkpoints."""
    config = _config(args)
    return visual_expert_app(assembly.expert_config(config), assembly.expert_app(config), http=True)


def iqa(args: dict[str, str]) -> Application:
    """The metrics of ``reward.expert``. Raises ConfigError for bad overrides or missing weights."""
    config = _config(args)
    return iqa_app(assembly.iqa_config(config), assembly.iqa_app(config), http=True)


def _config(args: dict[str, str]) -> TrainConfig:
    return load_config(shlex.split(args["overrides"]))


def _detector(config: TrainConfig) -> Application:
    return grounded_sam_app(assembly.detector_config(config), _of_run(config, GROUNDED_SAM))


def _expert(config: TrainConfig) -> Application:
    return visual_expert_app(assembly.expert_config(config), _of_run(config, QWEN_VL))


def _metrics(config: TrainConfig) -> Application:
    return iqa_app(assembly.iqa_config(config), _of_run(config, IQA))


def _extra(config: TrainConfig, name: str) -> Application:
    extra = config.reward.extra[name]
    return custom_app(extra.target, extra.options, _of_run(config, name))


def _of_run(config: TrainConfig, name: str) -> RewardAppSpec:
    return with_environment(assembly.app_spec(config, name), {RUN_VARIABLE: config.name})


_BUILD: dict[str, Callable[[TrainConfig], Application]] = {GROUNDED_SAM: _detector, QWEN_VL: _expert, IQA: _metrics}
