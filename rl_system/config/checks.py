"""What a type cannot say: combinations that would fail or mislead later."""

from __future__ import annotations

import math
import re
from pathlib import Path

from rl_system.config.schema import AutoscalingConfig, LoraConfig, TrainConfig
from rl_system.config.servers import EXPERTS, OBJECTS, checkpoints, own_servers
from vlcot.policy.family import Family, read_config
from vlcot.rewards import COMPONENTS, METRIC_EXPERTS, ExpertWeights

_SERVERS = ("grounded_sam", "qwen_vl", "iqa")

_NAME = r"[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?"
_KEY = re.compile(rf"([a-z0-9]([a-z0-9.-]{{0,251}}[a-z0-9])?/)?{_NAME}")
_VALUE = re.compile(_NAME)


def check(config: TrainConfig) -> None:
    """Refuse an impossible configuration.

    Raises:
        ValueError: naming the key, its value and what would be allowed.
    """
    check_settings(config)
    _check_expert(config)
    _check_extra(config)
    _check_checkpoints(config)
    _check_servers(config)


def check_settings(config: TrainConfig) -> None:
    """The part of :func:`check` that reads no file.

    Raises:
        ValueError: as :func:`check`.
    """
    _check_numbers(config)
    _check_choices(config)
    _check_labels(config)
    for name in _SERVERS:
        _check_autoscaling(f"reward.{name}.autoscaling", getattr(config.reward, name).autoscaling)
    _check_lora(config)
    ExpertWeights(**vars(config.reward.expert_weights))
    _check_asking(config)


def _check_numbers(config: TrainConfig) -> None:
    at_least = {
        "rollout.actors": (config.rollout.actors, 1),
        "rollout.group_size": (config.rollout.group_size, 2),
        "rollout.max_new_tokens": (config.rollout.max_new_tokens, 1),
        "rollout.max_num_seqs": (config.rollout.max_num_seqs, config.rollout.group_size),
        "learner.ranks": (config.learner.ranks, 1),
        "learner.steps": (config.learner.steps, 1),
        "learner.groups_per_step": (config.learner.groups_per_step, 1),
        "learner.epochs_per_batch": (config.learner.epochs_per_batch, 1),
        "coordination.max_staleness": (config.coordination.max_staleness, 0),
        "evaluation.prompts": (config.evaluation.prompts, 2),
        "data.train_rows": (config.data.train_rows, 1),
        **{f"reward.{name}.replicas": (getattr(config.reward, name).replicas, 1) for name in _SERVERS},
    }
    for key, (value, low) in at_least.items():
        if value < low:
            raise ValueError(f"{key}={value} is too small: it must be at least {low}")
    positive = {
        "rollout.temperature": config.rollout.temperature,
        "learner.learning_rate": config.learner.learning_rate,
        "learner.max_grad_norm": config.learner.max_grad_norm,
        "coordination.stall_timeout_s": config.coordination.stall_timeout_s,
        "reward.timeout_s": config.reward.timeout_s,
        "reward.start_timeout_s": config.reward.start_timeout_s,
    }
    for key, number in positive.items():
        if not 0 < number < math.inf:
            raise ValueError(f"{key}={number:g} must be positive and finite")
    for name, weight in vars(config.reward.weights).items():
        if weight < 0:
            raise ValueError(f"reward.weights.{name}={weight:g} must not be negative")
    if not any(vars(config.reward.weights).values()) and not any(e.weight > 0 for e in config.reward.extra.values()):
        raise ValueError("reward.weights switches every reward off; at least one weight must be positive")


def _check_choices(config: TrainConfig) -> None:
    choices = {
        "learner.schedule": (config.learner.schedule, ("constant", "cosine")),
        "grpo.normalisation": (config.grpo.normalisation, ("sequence", "token", "dr_grpo")),
        "grpo.kl": (config.grpo.kl, ("k1", "k2", "k3")),
        "grpo.advantage_std": (config.grpo.advantage_std, ("unbiased", "population", "none")),
        "rollout.dtype": (config.rollout.dtype, ("float32", "bfloat16")),
        "rollout.push_backend": (config.rollout.push_backend, ("object_store", "gloo", "nccl")),
        "rollout.on_push": (config.rollout.on_push, ("continue", "restart")),
        "learner.dtype": (config.learner.dtype, ("float32", "bfloat16")),
        "reward.objects": (config.reward.objects, tuple(OBJECTS)),
        "reward.expert": (config.reward.expert, tuple(EXPERTS)),
        "reward.failure_policy": (
            config.reward.failure_policy,
            ("min_viable_group", "retry_then_drop", "fail_fast"),
        ),
        "data.source": (config.data.source, ("toy_photographs", "folder", "prepared")),
        "cluster.address": (config.cluster.address, ("local", "auto")),
        "resume": (config.resume, ("never", "auto")),
    }
    for key, (value, allowed) in choices.items():
        if value not in allowed:
            raise ValueError(f"{key}={value} is not known; allowed: {', '.join(allowed)}")
    if config.resume == "auto" and config.overwrite:
        raise ValueError("resume=auto goes on with an existing run, overwrite=true moves it aside; choose one")
    if config.rollout.push_backend == "nccl" and not (config.rollout.num_gpus and config.learner.use_gpu):
        raise ValueError(
            "rollout.push_backend=nccl needs GPUs on both sides: rollout.num_gpus of at least 1 and "
            "learner.use_gpu=true; without them: object_store, gloo"
        )
    data = config.data
    if data.tags is not None and data.source != "folder":
        raise ValueError(f"data.tags={data.tags} belongs to data=folder; data.source={data.source} names its objects")
    if config.reward.objects == "file" and data.source == "folder" and data.tags is None:
        raise ValueError("reward.objects=file needs data.tags=DIR, a folder with the names of each image's objects")


def _check_lora(config: TrainConfig) -> None:
    from rl_system import assembly

    learner = config.learner
    if assembly.lora_spec(config) is None:
        usual = LoraConfig()
        for name, value in vars(learner.lora).items():
            if value != getattr(usual, name):
                raise ValueError(f"learner.lora.{name}={value} has no meaning without adapters (learner.lora.rank=0)")
    elif learner.offload_reference:
        raise ValueError(
            "learner.offload_reference=true has nothing to move with learner.lora: its reference is the frozen policy"
        )


def _check_labels(config: TrainConfig) -> None:
    labels_of = {
        "rollout": config.rollout.labels,
        "learner": config.learner.labels,
        **{f"reward.{name}": getattr(config.reward, name).labels for name in _SERVERS},
        **{f"reward.extra.{name}": extra.labels for name, extra in config.reward.extra.items()},
    }
    for pool, labels in labels_of.items():
        for key, value in labels.items():
            if not (_KEY.fullmatch(key) and _VALUE.fullmatch(value)):
                raise ValueError(
                    f"{pool}.labels={{{key}: {value}}} is no node label: write {{[prefix/]name: value}}, name and "
                    "value of at most 63 letters, digits, '-', '_' and '.', such as {rl.io/pool: rollout}"
                )
        if labels and config.cluster.address == "local":
            raise ValueError(
                f"{pool}.labels={labels} needs cluster.address=auto: the Ray that cluster.address=local "
                "starts has no labelled node"
            )


def _check_autoscaling(key: str, scaling: AutoscalingConfig) -> None:
    if scaling.max_replicas is None:
        return
    if scaling.min_replicas < 1:
        raise ValueError(f"{key}.min_replicas={scaling.min_replicas} is too small: a run keeps at least 1 replica")
    if scaling.max_replicas < scaling.min_replicas:
        raise ValueError(f"{key}.max_replicas={scaling.max_replicas} is below min_replicas={scaling.min_replicas}")
    if not scaling.target_ongoing_requests > 0:
        raise ValueError(f"{key}.target_ongoing_requests={scaling.target_ongoing_requests:g} must be positive")
    for name in ("upscale_delay_s", "downscale_delay_s"):
        if getattr(scaling, name) < 0:
            raise ValueError(f"{key}.{name}={getattr(scaling, name):g} must not be negative")


def _check_expert(config: TrainConfig) -> None:
    expert, iqa = config.reward.expert, config.reward.iqa
    if expert not in METRIC_EXPERTS:
        if iqa.metrics:
            raise ValueError(
                f"reward.iqa.metrics={list(iqa.metrics)} has no meaning with reward.expert={expert}; "
                f"metrics are for reward.expert={' | '.join(METRIC_EXPERTS)}"
            )
        return
    allowed = METRIC_EXPERTS[expert]
    if not set(iqa.metrics) <= set(allowed) or len(set(iqa.metrics)) < len(iqa.metrics):
        raise ValueError(
            f"reward.iqa.metrics={list(iqa.metrics)} must be some of {', '.join(allowed)}, the metrics of "
            f"reward.expert={expert}, each once"
        )
    if "iqa" in own_servers(config):
        from reward_servers.iqa import IqaConfig, find_weights

        try:
            find_weights(IqaConfig(tuple(iqa.metrics) or allowed, iqa.weights_dir))
        except ValueError as error:
            raise ValueError(f"reward.{error}; reward.iqa.metrics may leave metrics out") from None


def _check_asking(config: TrainConfig) -> None:
    from reward_servers.breaker import BreakerPolicy
    from reward_servers.http_guard import token_of_environment
    from reward_servers.retry import RetryPolicy

    reward, asked = config.reward, config.reward.client
    try:
        RetryPolicy(asked.attempts, asked.attempt_timeout_s, asked.hedge_after_s)
    except ValueError as error:
        raise ValueError(f"reward.client.{error}") from None
    try:
        BreakerPolicy(asked.breaker_failures, asked.breaker_pause_s)
    except ValueError as error:
        raise ValueError(f"reward.client.breaker_{error}") from None
    if not 0 <= reward.min_viable_share <= 1:
        raise ValueError(f"reward.min_viable_share={reward.min_viable_share:g} must lie in [0, 1]")
    if reward.rescore < 0:
        raise ValueError(f"reward.rescore={reward.rescore} must not be negative")
    if reward.url is not None:
        if not re.fullmatch(r"https?://[^/\s?#]+(/[^\s?#]*)?", reward.url):
            raise ValueError(f"reward.url={reward.url} is no address such as http://rewards:8000")
        try:
            token_of_environment()
        except ValueError as error:
            raise ValueError(f"reward.url={reward.url}: {error}") from None


def _check_extra(config: TrainConfig) -> None:
    taken = (*COMPONENTS, *_SERVERS, "total")
    for name, extra in config.reward.extra.items():
        key = f"reward.extra.{name}"
        if not re.fullmatch(r"[a-z][a-z0-9_]{0,31}", name) or name in taken:
            raise ValueError(
                f"{key}: a name has up to 32 small letters, digits and '_', and is none of {', '.join(taken)}"
            )
        if extra.weight < 0:
            raise ValueError(f"{key}.weight={extra.weight:g} must not be negative")
        if extra.replicas < 1:
            raise ValueError(f"{key}.replicas={extra.replicas} is too small: it must be at least 1")
        _check_autoscaling(f"{key}.autoscaling", extra.autoscaling)
        if config.reward.url is not None:
            raise ValueError(f"{key} is served inside the job only, reward.url={config.reward.url} is outside")
        from reward_servers.replicas import custom_class

        try:
            custom_class(extra.target)
        except ValueError as error:
            raise ValueError(f"{key}.target: {error}") from None


def _check_servers(config: TrainConfig) -> None:
    """What the servers would refuse when they start."""
    from reward_servers.contract import RewardServerError
    from reward_servers.grounded_sam import check_vocabulary
    from rl_system import assembly

    vocabulary = config.reward.grounded_sam.vocabulary
    if not isinstance(vocabulary, str | list):
        raise ValueError(f"reward.grounded_sam.vocabulary={vocabulary} is no list of names, `common` or a file")
    try:
        if "grounded_sam" in own_servers(config):
            check_vocabulary(assembly.detector_config(config))
        if "qwen_vl" in own_servers(config):
            assembly.expert_config(config)
    except (ValueError, RewardServerError) as error:
        raise ValueError(f"reward.{error}") from None


def _check_checkpoints(config: TrainConfig) -> None:
    from rl_system import assembly

    for key, directory in checkpoints(config).items():
        path = Path(directory)
        if not (path / "config.json").is_file():
            raise ValueError(f"{key}={directory}: no checkpoint there ({path.resolve()}/config.json does not exist)")
        if not list(path.glob("*.safetensors")):
            raise ValueError(f"{key}={directory}: the checkpoint has no .safetensors file")
    try:
        family = Family.from_pretrained(config.policy.path)
    except (ValueError, FileNotFoundError) as error:
        raise ValueError(f"policy.path={config.policy.path}: {error}") from error
    if lora := assembly.lora_spec(config):
        lora.check(read_config(config.policy.path))
    image_tokens = sum(len(block) + 1 for block in family.grammar.blocks)
    if config.rollout.max_new_tokens <= image_tokens:
        raise ValueError(
            f"rollout.max_new_tokens={config.rollout.max_new_tokens} is too small: the images alone take "
            f"{image_tokens} tokens"
        )
    for reward, block in {"degradation": "degradation", "understanding": "rough_understand"}.items():
        if getattr(config.reward.weights, reward) > 0 and block not in family.layout.blocks:
            raise ValueError(
                f"reward.weights.{reward} must be 0: the policy of policy.path={config.policy.path} writes no <{block}>"
            )
