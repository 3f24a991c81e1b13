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
ENGINES = {"rollout actor": "rollout engine", "expert replica": "expert engine"}
"""vLLM's processes, titled ``VLLM::...``: whose child it is says whose it is."""
OTHERS = "Ray"


@dataclass
class Peak:
    """Peaks of one process in bytes: ``resident`` as the kernel kept it (VmHWM), ``private`` (RssAnon) as sampled.

    ``resident`` is without shared memory. A process keeps every page of Ray's object store that it ever touched, so one
    that puts and gets grows up to the store's own size, which is there once for all: by 0 to 280 MiB in toy runs.
    """

    kind: str
    resident: int = 0
    private: int = 0

    def raise_to(self, resident: int, private: int) -> None:
        """Keep what is larger."""
        self.resident, self.private = max(self.resident, resident), max(self.private, private)


def watch(process: subprocess.Popen[bytes]) -> list[Peak]:
    """Peaks of ``process`` and of everything that it starts, when all have ended.

    The kernel's own peak is read, so nothing is missed between two looks but the last half second of a process. Ray's
    processes, of which many live shortly, are one :class:`Peak`: the largest sum of those that lived together.
    """
    family = Descendants(process.pid)
    peaks: dict[int, Peak] = {process.pid: Peak("driver")}
    looks: list[dict[int, tuple[int, int]]] = []
    while process.poll() is None:
        looks.append({})
        for row in family.rows():
            peak = peaks.setdefault(row.pid, Peak(OTHERS))
            if peak.kind == OTHERS:  # a worker has its title only when it has its work
                peak.kind = _kind(row, peaks)
            if (seen := _status(row.pid)) is not None:
                looks[-1][row.pid] = seen["VmRSS"] - seen["RssShmem"], seen["RssAnon"]
                peak.raise_to(seen["VmHWM"] - seen["RssShmem"], seen["RssAnon"])
        time.sleep(WATCH_S)
    together = Peak(OTHERS)
    for look in looks:
        others = [seen for pid, seen in look.items() if peaks[pid].kind == OTHERS]
        together.raise_to(sum(resident for resident, _ in others), sum(private for _, private in others))
    return [*(peak for peak in peaks.values() if peak.kind != OTHERS), together]


def _kind(row: Row, peaks: dict[int, Peak]) -> str:
    for title, kind in TITLES.items():
        if row.title.startswith(title):
            return kind
    parent = peaks.get(row.parent)
    if row.title.startswith("VLLM::") and parent is not None:
        return ENGINES.get(parent.kind, OTHERS)
    return OTHERS


def _status(pid: int) -> dict[str, int] | None:
    """Bytes by the kernel's names (VmHWM, VmRSS, RssAnon, RssShmem); None for a process that has ended."""
    with suppress(OSError, psutil.NoSuchProcess):
        lines = dict(_lines(Path(f"/proc/{pid}/status").read_text()))
        if "VmHWM" in lines:
            return lines
    return None


def _lines(text: str) -> Iterator[tuple[str, int]]:
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if value.endswith(" kB"):
            yield name, int(value.split()[0]) * 1024
