"""The processes of a run, found by descent from those that were started here, and by nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass

import psutil


@dataclass(frozen=True)
class Row:
    """One process: ids, its title, and when it was started (epoch seconds)."""

    pid: int
    parent: int
    title: str
    started_s: float


def rollout_actors(table: Iterable[Row]) -> list[Row]:
    """Ray actors that hold a rollout engine."""
    return _titled(table, "ray::RolloutActor")


def rollout_engines(table: Iterable[Row]) -> list[Row]:
    """vLLM's engine processes below the rollout actors; the visual expert has one of the same title."""
    table = list(table)
    actors = {row.pid for row in rollout_actors(table)}
    return [row for row in _titled(table, "VLLM::EngineCore") if row.parent in actors]


def learner_ranks(table: Iterable[Row]) -> list[Row]:
    """Workers of Ray Train."""
    return _titled(table, "ray::RayTrainWorker")


def replicas(server: str) -> Callable[[Iterable[Row]], list[Row]]:
    """Finds the Serve replicas of a reward server."""
    return lambda table: _titled(table, f"ray::ServeReplica:{server}:")


def _titled(table: Iterable[Row], start: str) -> list[Row]:
    return sorted((row for row in table if row.title.startswith(start)), key=lambda row: row.pid)


class Descendants:
    """A process that was started here and all that came from it, also those whose parents have died since.

    :meth:`look` must be called now and then: who starts and is orphaned between two calls is not known.
    """

    def __init__(self, pid: int) -> None:
        self._known = {psutil.Process(pid)}

    def look(self) -> None:
        """Get to know who has come."""
        others = [p for p in psutil.process_iter(["ppid"]) if p not in self._known]
        living = {process.pid for process in self._known if process.is_running()}
        while new := [p for p in others if p.info["ppid"] in living and p.pid not in living]:
            self._known.update(new)
            living.update(p.pid for p in new)

    def rows(self) -> list[Row]:
        """Those that live now."""
        self.look()
        rows = (_row(process) for process in self._known)
        return [row for row in rows if row is not None]

    def kill(self) -> int:
        """SIGKILL to all of them at once; how many lived."""
        pids = {row.pid for row in self.rows()}
        living = [process for process in self._known if process.pid in pids]
        for process in living:
            with suppress(psutil.NoSuchProcess):
                process.kill()  # psutil compares start times: a reused id is not hit
        return len(living)


def _row(process: psutil.Process) -> Row | None:
    """None for one that has ended."""
    try:
        if not process.is_running() or process.status() == psutil.STATUS_ZOMBIE:
            return None
        return Row(process.pid, process.ppid(), " ".join(process.cmdline()).strip(), process.create_time())
    except psutil.NoSuchProcess:
        return None
