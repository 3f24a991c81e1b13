"""Settings of a server that change while it serves, as Ray Serve's ``user_config`` brings them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

Settings = TypeVar("Settings")


def with_settings(config: Settings, changes: Mapping[str, Any], live: Collection[str], where: str) -> Settings:
    """``config`` with other values; ``config`` itself stays as it is.

    Args:
        config: a frozen dataclass that checks its values.
        changes: field -> value. A field that is a dataclass takes a mapping of those of its fields that change.
        live: fields that may change.
        where: name of the server, for the errors.

    Raises:
        ValueError: a key that may not change or does not exist, or a value that the dataclass refuses.
    """
    _check_keys(changes, live, where)
    values = {}
    for key, value in changes.items():
        present = getattr(config, key)
        if is_dataclass(present) and not isinstance(present, type):
            _check_keys(value, [part.name for part in fields(present)], f"{where}.{key}")
            value = replace(present, **value)
        values[key] = value
    return replace(config, **values)  # type: ignore[type-var]


def _check_keys(changes: Any, known: Collection[str], where: str) -> None:
    if not isinstance(changes, Mapping):
        raise ValueError(f"{where}: live settings must be a mapping, got {changes!r}")
    for key in changes:
        if key not in known:
            raise ValueError(f"{where}.{key} is no live setting; these are: {', '.join(known)}")
