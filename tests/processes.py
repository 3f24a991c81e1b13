"""Processes that tests end or wait for."""

from __future__ import annotations

import psutil


def alive(process: psutil.Process) -> bool:
    """Neither gone nor waiting for its parent to notice."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
