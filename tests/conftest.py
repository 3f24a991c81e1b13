"""Settings that every test needs before an engine is imported."""

from __future__ import annotations

import gc
import os

import pytest
from hypothesis import settings

# The same examples in every run, and no limit on the time of one: the machine may be busy with something else.
settings.register_profile("tests", deadline=None, derandomize=True, database=None)
settings.load_profile("tests")

for name, value in {
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",  # workers share the cores with the test that waits for them
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}.items():
    os.environ.setdefault(name, value)


# Imports make a million objects that stay: nothing is gained by looking through them again and again.
gc.disable()


def pytest_collection_finish() -> None:
    """What was imported is left out of every collection of garbage."""
    gc.freeze()
    gc.enable()


def pytest_unconfigure() -> None:
    """Libraries look at their end for what nobody has collected."""
    gc.unfreeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give every engine test a second try, listed as RERUN: engines race for ports, cores and their own exit."""
    for item in items:
        if item.get_closest_marker("engine"):
            item.add_marker(pytest.mark.flaky(reruns=1))
