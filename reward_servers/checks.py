"""Checks of settings, shared by all servers; each message names the setting."""

from __future__ import annotations


def check_share(where: str, value: object) -> None:
    """Raises ValueError unless ``value`` is a number in [0, 1]."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 <= value <= 1.0:
        raise ValueError(f"{where} must lie in [0, 1], got {value!r}")


def check_count(where: str, value: object, least: int = 1) -> None:
    """Raises ValueError unless ``value`` is a whole number of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{where} must be a whole number of at least {least}, got {value!r}")


def check_question(where: str, value: object) -> None:
    """Raises ValueError unless ``value`` is a text that is not blank."""
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{where} must be a question, got {value!r}")
