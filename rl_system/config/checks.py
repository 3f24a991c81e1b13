"""What a type cannot say: combinations that would fail or mislead later."""

from __future__ import annotations

import re
from pathlib import Path

from rl_system.config.schema import AutoscalingConfig, TrainConfig
from vlcot.policy.family import Family
from vlcot.rewards import ExpertWeights

_NAME = r"[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?"
_KEY = re.compile(rf"([a-z0-9]([a-z0-9.-]{{0,251}}[a-z0-9])?/)?{_NAME}")
_VALUE = re.compile(_NAME)


def check(config: TrainConfig) -> None:
    """Refuse an impossible configuration.

    Raises:
        ValueError: naming the key, its value and what would be allowed.
    """
    _check_numbers(config)
    _check_choices(config)
    _check_labels(config)
    _check_autoscaling("reward.grounded_sam.autoscaling", config.reward.grounded_sam.autoscaling)
    _check_autoscaling("reward.qwen_vl.autoscaling", config.reward.qwen_vl.autoscaling)
    ExpertWeights(**vars(config.reward.expert_weights))
    _check_checkpoints(config)


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
        "reward.grounded_sam.replicas": (config.reward.grounded_sam.replicas, 1),
        "reward.qwen_vl.replicas": (config.reward.qwen_vl.replicas, 1),
    }
    for key, (value, low) in at_least.items():
        if value < low:
            raise ValueError(f"{key}={value} is too small: it must be at least {low}")
    positive = {
        "rollout.temperature": config.rollout.temperature,
        "learner.learning_rate": config.learner.learning_rate,
        "learner.max_grad_norm": config.learner.max_grad_norm,
        "coordination.stall_timeout_s": config.coordination.stall_timeout_s,
    }
    for key, number in positive.items():
        if not number > 0:
            raise ValueError(f"{key}={number:g} must be positive")
    for name, weight in vars(config.reward.weights).items():
        if weight < 0:
            raise ValueError(f"reward.weights.{name}={weight:g} must not be negative")


def _check_choices(config: TrainConfig) -> None:
    choices = {
        "learner.schedule": (config.learner.schedule, ("constant", "cosine")),
        "grpo.normalisation": (config.grpo.normalisation, ("sequence", "token", "dr_grpo")),
        "grpo.kl": (config.grpo.kl, ("k1", "k2", "k3")),
        "grpo.advantage_std": (config.grpo.advantage_std, ("unbiased", "population", "none")),
        "rollout.dtype": (config.rollout.dtype, ("float32", "bfloat16")),
        "learner.dtype": (config.learner.dtype, ("float32", "bfloat16")),
        "data.source": (config.data.source, ("toy_photographs", "folder")),
        "cluster.address": (config.cluster.address, ("local", "auto")),
    }
    for key, (value, allowed) in choices.items():
        if value not in allowed:
            raise ValueError(f"{key}={value} is not known; allowed: {', '.join(allowed)}")


def _check_labels(config: TrainConfig) -> None:
    labels_of = {
        "rollout": config.rollout.labels,
        "learner": config.learner.labels,
        "reward.grounded_sam": config.reward.grounded_sam.labels,
        "reward.qwen_vl": config.reward.qwen_vl.labels,
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


def _check_checkpoints(config: TrainConfig) -> None:
    directories = {
        "policy.path": config.policy.path,
        "policy.image_tokenizer": config.policy.image_tokenizer,
        "reward.grounded_sam.detector": config.reward.grounded_sam.detector,
        "reward.grounded_sam.segmenter": config.reward.grounded_sam.segmenter,
        "reward.qwen_vl.model": config.reward.qwen_vl.model,
    }
    for key, directory in directories.items():
        path = Path(directory)
        if not (path / "config.json").is_file():
            raise ValueError(f"{key}={directory}: no checkpoint there ({path.resolve()}/config.json does not exist)")
        if not list(path.glob("*.safetensors")):
            raise ValueError(f"{key}={directory}: the checkpoint has no .safetensors file")
    try:
        family = Family.from_pretrained(config.policy.path)
    except (ValueError, FileNotFoundError) as error:
        raise ValueError(f"policy.path={config.policy.path}: {error}") from error
    image_tokens = sum(len(block) + 1 for block in family.grammar.blocks)
    if config.rollout.max_new_tokens <= image_tokens:
        raise ValueError(
            f"rollout.max_new_tokens={config.rollout.max_new_tokens} is too small: the three images alone take "
            f"{image_tokens} tokens"
        )
