"""Weights & Biases and MLflow as sinks. Neither is installed with this project; each is configured by its own
environment variables (``WANDB_API_KEY``, ``WANDB_MODE``; ``MLFLOW_TRACKING_URI``, ``MLFLOW_EXPERIMENT_NAME``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from rl_system.config.resume import settings_of
from rl_system.runs.directory import RunDirectory
from rl_system.runs.sinks import MetricSink

PROJECT = "rl-system"


class WandbSink:
    """A run of Weights & Biases in the project ``rl-system``; a resumed run goes on with the same one."""

    def __init__(self, run: RunDirectory) -> None:
        wandb: Any = import_module("wandb")
        self._run = wandb.init(
            project=PROJECT, id=_identity(run), name=run.name, resume="allow", dir=str(run.path), config=_settings(run)
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log ``metrics`` at ``step``."""
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        """Wait until everything is sent."""
        self._run.finish()


class MlflowSink:
    """A run of MLflow; a resumed run goes on with the same one, whose id is in ``mlflow_run``."""

    def __init__(self, run: RunDirectory) -> None:
        self._mlflow: Any = import_module("mlflow")
        stored = run.path / "mlflow_run"
        if stored.exists():
            self._mlflow.start_run(run_id=stored.read_text())
            return
        started = self._mlflow.start_run(run_name=run.name)
        stored.write_text(started.info.run_id)
        self._mlflow.log_params(_settings(run))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log ``metrics`` at ``step``."""
        self._mlflow.log_metrics({name: float(value) for name, value in metrics.items()}, step=step)

    def close(self) -> None:
        """End the run."""
        self._mlflow.end_run()


TRACKERS: dict[str, Callable[[RunDirectory], MetricSink]] = {"wandb": WandbSink, "mlflow": MlflowSink}


def check_trackers(names: list[str]) -> None:
    """Refuse names that are none, and packages that are not installed.

    Raises:
        ValueError: naming it.
    """
    for name in names:
        if name not in TRACKERS:
            raise ValueError(f"trackers=[{name}] is not known; allowed: {', '.join(TRACKERS)}")
        if find_spec(name) is None:
            raise ValueError(f"trackers=[{name}] needs the package {name}, which is not installed: pip install {name}")


def open_trackers(names: list[str], run: RunDirectory) -> list[MetricSink]:
    """The sinks of these names."""
    return [TRACKERS[name](run) for name in names]


def _identity(run: RunDirectory) -> str:
    return f"{run.name}-{run.status()['started_s']:.0f}"


def _settings(run: RunDirectory) -> dict[str, Any]:
    return settings_of(run.config.read_text())
