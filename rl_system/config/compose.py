"""From command-line overrides to a checked :class:`TrainConfig`, before any process starts."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, cast, get_type_hints

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

import configs
from reward_servers.detection import COMMON
from rl_system.config.checks import check
from rl_system.config.schema import ExtraRewardConfig, TrainConfig
from rl_system.config.uris import absolute

CONFIG_DIR = Path(configs.__file__).resolve().parent


class ConfigError(ValueError):
    """The configuration or an input is wrong; the message says what, where, and what would be right."""


def load_config(overrides: Sequence[str]) -> TrainConfig:
    """Compose and check a training configuration.

    Args:
        overrides: Hydra overrides, ``experiment=toy rollout.group_size=8``.

    Raises:
        ConfigError: unknown key or choice, wrong type, missing value, or an impossible combination.
    """
    config = compose_config(overrides)
    try:
        check(config)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    _make_paths_absolute(config)
    return config


def compose_config(overrides: Sequence[str]) -> TrainConfig:
    """Compose without :func:`check`: the run may be for another machine, where its checkpoints are.

    Raises:
        ConfigError: unknown key or choice, wrong type, or missing value.
    """
    if not any(o.startswith("experiment=") for o in overrides):
        raise ConfigError(f"say which experiment to run: experiment={' | '.join(experiments())}")
    _store_schema()
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
            composed = compose("config", overrides=list(overrides))
        config = cast(TrainConfig, OmegaConf.to_object(composed))
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_explain(error)) from None
    config.reward.extra = {name: _extra_reward(name, given) for name, given in config.reward.extra.items()}
    return config


@cache
def _store_schema() -> None:
    ConfigStore.instance().store(name="schema", node=TrainConfig)


def _extra_reward(name: str, given: Any) -> ExtraRewardConfig:
    try:
        return cast(ExtraRewardConfig, OmegaConf.to_object(OmegaConf.merge(ExtraRewardConfig, given)))
    except (ValueError, OmegaConfBaseException) as error:
        allowed = ", ".join(field.name for field in fields(ExtraRewardConfig))
        first = str(error).splitlines()[0]
        raise ConfigError(f"reward.extra.{name}: {first}; it takes a mapping with the keys {allowed}") from None


def _make_paths_absolute(config: TrainConfig) -> None:
    """Worker processes have working directories of their own."""
    try:
        config.output_dir = absolute(config.output_dir)
    except ValueError as error:
        raise ConfigError(f"output_dir={error}") from None
    sam, expert, iqa = config.reward.grounded_sam, config.reward.qwen_vl, config.reward.iqa
    for owner, name in (
        (config, "scratch_dir"),
        (config.policy, "path"),
        (config.policy, "image_tokenizer"),
        (config.data, "path"),
        (config.data, "tags"),
        (sam, "detector"),
        (sam, "segmenter"),
        (expert, "model"),
        (iqa, "weights_dir"),
    ):
        if value := getattr(owner, name):
            setattr(owner, name, str(Path(value).resolve()))
    if isinstance(sam.vocabulary, str) and sam.vocabulary != COMMON:
        sam.vocabulary = str(Path(sam.vocabulary).resolve())


def to_yaml(config: TrainConfig) -> str:
    """The resolved configuration as YAML."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def experiments() -> list[str]:
    """Names of the experiments that ship."""
    return sorted(path.stem for path in (CONFIG_DIR / "experiment").glob("*.yaml"))


def _explain(error: Exception) -> str:
    """Hydra's message in one line, with the allowed keys for an unknown one."""
    text = " ".join(str(error).split()).split(" Config search path")[0]
    unknown = re.search(r"Could not override '([\w.]+)'|Key '(\w+)' (?:is )?not in", text)
    if unknown is None:
        cause = error.__cause__
        return f"bad configuration: {text}" + (f" ({' '.join(str(cause).split())})" if cause else "")
    dotted = unknown[1] or _full_key(text) or unknown[2]
    *parents, key = dotted.split(".")
    allowed = _keys_at(parents)
    if key in allowed:  # a mapping, and an entry that it does not have yet
        return f"configuration key '{dotted}' takes a new entry as '+{dotted}={{name: value}}'"
    close = difflib.get_close_matches(key, allowed, 1)
    hint = f"did you mean '{'.'.join([*parents, close[0]])}'? " if close else ""
    where = ".".join(parents) or "the top level"
    return f"unknown configuration key '{dotted}'. {hint}Keys allowed at {where}: {', '.join(allowed)}"


def _full_key(text: str) -> str | None:
    match = re.search(r"full_key: ([\w.]+)", text)
    return match[1] if match else None


def _keys_at(parents: Sequence[str]) -> list[str]:
    node: Any = TrainConfig
    for name in parents:
        node = get_type_hints(node).get(name) if is_dataclass(node) else None
    return sorted(f.name for f in fields(node)) if is_dataclass(node) else []
