"""Training runs of the toy experiment as a benchmark starts them, and what they leave."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from bisect import bisect_left
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

Interval = tuple[float, float]
FEW_PROMPTS = ("evaluation.prompts=2", "evaluation.pictures=1")
WATCH_S = 0.5


@dataclass(frozen=True)
class ToyRun:
    """``timeline.jsonl`` and ``metrics.jsonl`` of a finished run, and CPU seconds of all its processes so far, at epoch
    seconds."""

    timeline: list[dict[str, Any]]
    metrics: list[dict[str, Any]]
    cpu: list[tuple[float, float]]

    def intervals(self, process: str) -> list[Interval]:
        """Begin and end, in epoch seconds, of everything that processes of this kind did."""
        return [(e["start_s"], e["end_s"]) for e in self.timeline if e["process"].split()[0] == process]

    def window(self, before: int, last: int) -> Interval:
        """From the push of step ``before`` to that of step ``last``, epoch seconds."""
        ends = sorted(end for _, end in self.intervals("learner"))
        return ends[before - 1], ends[last - 1]

    def mean(self, name: str, before: int, last: int) -> float:
        """Mean of a metric over the steps after ``before``, up to ``last``."""
        return statistics.mean(line[name] for line in self.metrics if before < line["step"] <= last)

    def cpu_seconds(self, window: Interval) -> float:
        """CPU seconds of all processes in ``window``, to the precision of the watch."""
        begin, end = (self.cpu[bisect_left(self.cpu, (moment, 0.0))][1] for moment in window)
        return end - begin


def train(folder: Path, name: str, *overrides: str) -> ToyRun:
    """`rl-system train experiment=toy` with ``overrides``.

    Raises:
        RuntimeError: it failed.
    """
    command = [sys.executable, "-m", "rl_system", "train", "experiment=toy", *FEW_PROMPTS]
    command += [f"output_dir={folder}", f"name={name}", *overrides]
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, env=os.environ | {"RAY_AUTH_MODE": "disabled"}
        )
        cpu = _watch(process)
        if process.returncode:
            output.seek(0)
            raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}: {output.read()[-2000:]}")
    timeline, metrics = (
        [json.loads(line) for line in (folder / name / file).read_text().splitlines()]
        for file in ("timeline.jsonl", "metrics.jsonl")
    )
    return ToyRun(timeline, metrics, cpu)


def slow_reward(seconds: float) -> str:
    """Override that adds a reward of next to no weight that takes ``seconds``."""
    options = f'target: "benchmarks.slow_reward:SlowReward", weight: 1.0e-6, options: {{seconds: {seconds:.3f}}}'
    return f"+reward.extra.slow={{{options}}}"


def _watch(process: subprocess.Popen[bytes]) -> list[tuple[float, float]]:
    """CPU seconds of the process and its descendants until it ends; what dead ones had used stays counted."""
    used: dict[int, float] = {}
    seen = []
    while process.poll() is None:
        try:
            family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        except psutil.NoSuchProcess:
            break
        for member in family:
            try:
                times = member.cpu_times()
            except psutil.NoSuchProcess:
                continue
            used[member.pid] = times.user + times.system
        seen.append((time.time(), sum(used.values())))
        time.sleep(WATCH_S)
    process.wait()
    return seen
