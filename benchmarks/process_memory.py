"""Peak memory of every process of a run, by kind."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmarks.chaos.processes import Descendants, Row

WATCH_S = 0.5
TITLES = {
    "ray::RayTrainWorker": "learner rank",
    "ray::RolloutActor": "rollout actor",
    "ray::ServeReplica:grounded_sam:": "Grounded-SAM replica",
    "ray::ServeReplica:qwen_vl:": "expert replica",
}
CHILDREN = {
    "rollout actor": "rollout engine",
    "rollout engine": "rollout worker",
    "expert replica": "expert engine",
    "expert engine": "expert worker",
}
"""vLLM's processes, titled ``VLLM::...``: whose child it is says whose it is."""
OTHERS = "Ray"


@dataclass
class Peak:
    """Peaks of one process in bytes: ``resident`` as the kernel kept it (VmHWM), ``private`` (RssAnon) as sampled."""

    kind: str
    title: str = ""
    resident: int = 0
    private: int = 0


def watch(process: subprocess.Popen[bytes]) -> list[Peak]:
    """Peaks of ``process`` and of everything that it starts, when all have ended.

    The kernel's own peak is read, so nothing is missed between two looks but the last half second of a process.
    """
    family = Descendants(process.pid)
    peaks: dict[int, Peak] = {process.pid: Peak("driver")}
    while process.poll() is None:
        rows = family.rows()
        for row in rows:
            peak = peaks.setdefault(row.pid, Peak(OTHERS))
            if peak.kind == OTHERS:
                peak.kind, peak.title = _kind(row, peaks), row.title
            if (seen := _status(row.pid)) is not None:
                resident, private = seen
                peak.resident, peak.private = max(peak.resident, resident), max(peak.private, private)
        time.sleep(WATCH_S)
    return list(peaks.values())


def _kind(row: Row, peaks: dict[int, Peak]) -> str:
    for title, kind in TITLES.items():
        if row.title.startswith(title):
            return kind
    parent = peaks.get(row.parent)
    if row.title.startswith("VLLM::") and parent is not None:
        return CHILDREN.get(parent.kind, OTHERS)
    return OTHERS


def _status(pid: int) -> tuple[int, int] | None:
    """VmHWM and RssAnon; None for a process that has ended."""
    with suppress(OSError, psutil.NoSuchProcess):
        lines = dict(_lines(Path(f"/proc/{pid}/status").read_text()))
        if "VmHWM" in lines:
            return lines["VmHWM"], lines["RssAnon"]
    return None


def _lines(text: str) -> Iterator[tuple[str, int]]:
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if value.endswith(" kB"):
            yield name, int(value.split()[0]) * 1024
