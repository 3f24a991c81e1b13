"""Which settings may differ when a run goes on."""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import Any

from omegaconf import OmegaConf

MAY_CHANGE = (
    "resume",
    "overwrite",
    "output_dir",
    "scratch_dir",
    "kept_groups",
    "trackers",
    "cluster.*",
    "rollout.actors",
    "rollout.labels.*",
    "rollout.num_?pus",
    "rollout.push_backend",
    "rollout.start_timeout_s",
    "learner.labels.*",
    "learner.num_cpus",
    "learner.checkpoint_every",
    "learner.keep_checkpoints",
    "learner.activation_checkpointing",
    "learner.offload_reference",
    "learner.bucket_mib",
    "coordination.stall_timeout_s",
    "evaluation.pictures",
    "evaluation.num_?pus",
    "evaluation.kv_cache_gib",
    "evaluation.start_timeout_s",
    "reward.url",
    "reward.*timeout_s",
    "reward.client.*",
    "reward.*.replicas",
    "reward.*.autoscaling.*",
    "reward.*.num_?pus",
    "reward.*.labels.*",
)
"""Where and how fast a run works, not what it computes."""


def changed_settings(before: str, now: str) -> list[str]:
    """Settings that a resumed run must not change, and would: ``key=NOW (was BEFORE)``.

    Args:
        before: resolved configuration of the run, YAML.
        now: that of the command that wants to go on with it.
    """
    old, new = settings_of(before), settings_of(now)
    return [
        f"{key}={new.get(key, 'unset')} (was {old.get(key, 'unset')})"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and not any(fnmatchcase(key, pattern) for pattern in MAY_CHANGE)
    ]


def settings_of(config_yaml: str) -> dict[str, Any]:
    """The settings of a resolved configuration by their full keys, as ``learner.steps``."""
    return dict(_leaves(OmegaConf.to_container(OmegaConf.create(config_yaml))))


def _leaves(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(node, dict) and node:
        for key, value in node.items():
            yield from _leaves(value, f"{prefix}{key}.")
    elif not isinstance(node, dict):
        yield prefix.removesuffix("."), node
