"""What a run is doing now: written by its driver once a second, read by ``rl-system status``."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field

from rl_system.runs.directory import RunDirectory
from rl_system.runs.files import write_json

EVERY_S = 1.0


@dataclass(frozen=True)
class Process:
    """One row of the table: a rollout actor, a reward server or the learner group, and what it does."""

    name: str
    state: str
    doing: str = ""
    version: int | None = None


@dataclass(frozen=True)
class LiveState:
    """A moment of a run.

    Attributes:
        stage: what the run as a whole does; ``done`` of ``total`` parts of it where that is known.
        step, steps: trained, and to train.
        groups: groups by state.
        waits: what the groups that are under way wait for.
        quiet_s: seconds since a group got its rewards or a step was done.
        time_s: epoch seconds.
    """

    stage: str
    done: int = 0
    total: int | None = None
    step: int = 0
    steps: int = 0
    processes: Sequence[Process] = ()
    groups: Mapping[str, int] = field(default_factory=dict)
    waits: str = ""
    quiet_s: float = 0.0
    time_s: float = field(default_factory=time.time)


def write_live(run: RunDirectory, state: LiveState) -> None:
    """Replace ``live.json``."""
    write_json(run.live, asdict(state))


def read_live(run: RunDirectory) -> LiveState | None:
    """What :func:`write_live` wrote last; None if nothing."""
    if not run.live.exists():
        return None
    record = json.loads(run.live.read_text())
    return LiveState(**record | {"processes": [Process(**process) for process in record["processes"]]})


async def keep_writing(run: RunDirectory, state: Callable[[], LiveState]) -> None:
    """Write what ``state`` says once a second, until cancelled; then a last time."""
    try:
        while True:
            write_live(run, state())
            await asyncio.sleep(EVERY_S)
    finally:
        write_live(run, state())
