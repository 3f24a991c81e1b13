"""Where metrics go: a JSON line per step, TensorBoard, Ray's Prometheus endpoint. Every sink uses the same names."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from tensorboardX import SummaryWriter

from rl_system.runs.directory import RunDirectory
from rl_system.runs.files import JsonLines, cut_json_lines, read_json_lines
from rl_system.runs.metric_names import MEANINGS, prometheus_name

if TYPE_CHECKING:
    from ray.util.metrics import Gauge

_RESERVED = ("step", "time_s", "nonfinite")


class MetricSink(Protocol):
    """Takes the metrics of a step."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record ``metrics`` of ``step``."""

    def close(self) -> None:
        """Write what is pending and release the files."""


class JsonlSink:
    """One JSON object per step: ``step``, ``time_s`` (epoch), and each metric under its name.

    NaN and infinities are written as null, and their names listed in ``nonfinite``.
    """

    def __init__(self, path: Path) -> None:
        self._lines = JsonLines(path)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append the line of ``step``. ValueError if a metric has the name of another field."""
        if taken := [name for name in _RESERVED if name in metrics]:
            raise ValueError(f"a metric must not be named {taken[0]!r}: the line of a step has such a field")
        values = {name: float(value) for name, value in metrics.items()}
        nonfinite = [name for name, value in values.items() if not math.isfinite(value)]
        record = {"step": step, "time_s": time.time(), **values, **dict.fromkeys(nonfinite)}
        self._lines.append(record | {"nonfinite": nonfinite} if nonfinite else record)

    def close(self) -> None:
        """Close the file."""
        self._lines.close()


class TensorBoardSink:
    """TensorBoard scalars in ``directory``; those of steps after ``done`` that are there already no longer show."""

    def __init__(self, directory: Path, done: int = 0) -> None:
        self._writer = SummaryWriter(str(directory), purge_step=done + 1 if done else None)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add each metric as a scalar."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, float(value), step)
        self._writer.flush()

    def close(self) -> None:
        """Flush and close the event file."""
        self._writer.close()


class PrometheusSink:
    """Gauges at the Prometheus endpoint of the Ray node on which this process runs, with the tag ``run``.

    A gauge goes with the first step that has none, and when the process ends. Ray must be connected.
    """

    def __init__(self, run: str) -> None:
        self._run = run
        self._gauges: dict[str, Gauge] = {}

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Set the gauge of each metric; ``step`` is in ``weights/version``."""
        self.show(metrics)

    def show(self, metrics: Mapping[str, float]) -> None:
        """Set gauges that belong to no step."""
        from ray.util.metrics import Gauge

        for name, value in metrics.items():
            if name not in self._gauges:
                meaning = MEANINGS.get(name, f"{name} (of a reward of the user's own)")
                self._gauges[name] = Gauge(prometheus_name(name), meaning, tag_keys=("run",))
            self._gauges[name].set(float(value), {"run": self._run})

    def close(self) -> None:
        """Nothing is pending: Ray exports by itself."""


class CompositeSink:
    """Passes everything on to several sinks."""

    def __init__(self, sinks: Sequence[MetricSink]) -> None:
        self._sinks = tuple(sinks)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log to each sink."""
        for sink in self._sinks:
            sink.log(step, metrics)

    def close(self) -> None:
        """Close each sink."""
        for sink in self._sinks:
            sink.close()


def open_sinks(run: RunDirectory, done: int = 0, *others: MetricSink) -> MetricSink:
    """``metrics.jsonl``, ``tensorboard/`` and ``others``; they go on behind step ``done``."""
    cut_json_lines(run.metrics, lambda line: line["step"] <= done)
    return CompositeSink([JsonlSink(run.metrics), TensorBoardSink(run.tensorboard, done), *others])


@dataclass(frozen=True)
class StepMetrics:
    """Metrics of one step; NaN stands for any value that was not finite."""

    step: int
    time_s: float
    values: Mapping[str, float]


def read_metrics(path: Path) -> list[StepMetrics]:
    """What :class:`JsonlSink` wrote, in the order of the lines; a half line is skipped with a warning."""
    return [
        StepMetrics(
            record["step"],
            record["time_s"],
            {n: math.nan if v is None else float(v) for n, v in record.items() if n not in _RESERVED},
        )
        for record in read_json_lines(path)
    ]
