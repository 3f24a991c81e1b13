"""Configurations of one YAML file and `KEY=VALUE` overrides: what `prepare-data` and `cold-start` take."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rl_system.config.compose import ConfigError

T = TypeVar("T")


def load_recipe(kind: type[T], file: Path, overrides: Sequence[str]) -> T:
    """The dataclass ``kind`` with the values of ``file`` and then of ``overrides`` (``a.b=value``, value in YAML).

    Raises:
        ConfigError: unknown key, no YAML, or a wrong type.
    """
    try:
        config = OmegaConf.merge(OmegaConf.structured(kind), OmegaConf.load(file))
        known = list(_keys(cast(DictConfig, config)))
        for override in overrides:
            key, equals, value = override.partition("=")
            if key not in known or not equals:
                close = difflib.get_close_matches(key, known, 1)
                hint = f"did you mean '{close[0]}'? " if close else ""
                raise ConfigError(f"'{override}' is no KEY=VALUE of this command. {hint}Keys: {', '.join(known)}")
            OmegaConf.update(config, key, _value(key, value))
        return cast(T, OmegaConf.to_object(config))
    except OmegaConfBaseException as error:
        raise ConfigError(f"bad configuration: {str(error).splitlines()[0]}") from None


def _value(key: str, text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{key}: the value is no YAML: {' '.join(str(error).split())}") from None


def _keys(config: DictConfig, above: str = "") -> Iterator[str]:
    for key in map(str, config):
        node = None if OmegaConf.is_missing(config, key) else config[key]
        if isinstance(node, DictConfig) and len(node):
            yield from _keys(node, f"{above}{key}.")
        else:
            yield f"{above}{key}"
