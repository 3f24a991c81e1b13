"""Stored groups in simulated time: a writer that is slow and dies with its driver, and what happens to files."""

from __future__ import annotations

import asyncio
from concurrent.futures import Executor, Future
from pathlib import Path
from random import Random

from rl_system.runs.group_file import GroupFile
from tests.rl_system.schedules.rewards import prompt
from tests.rl_system.schedules.schedule import Damage, Schedule


class SlowWriter(Executor):
    """Does one thing after the other, each after a while; what the driver's death finds undone is never done."""

    def __init__(self, schedule: Schedule, chance: Random) -> None:
        self._longest, self._chance = schedule.pace.write, chance
        self._last: asyncio.Task[None] | None = None

    def submit(self, fn, /, *args, **kwargs):
        self._last = asyncio.create_task(self._do(self._last, lambda: fn(*args, **kwargs)))
        return Future()

    async def _do(self, before, job) -> None:
        if before is not None:
            await before
        await asyncio.sleep(self._chance.uniform(0, self._longest))
        job()

    async def finish(self) -> None:
        """What ``shutdown`` waits for."""
        if self._last is not None:
            await self._last


def orders(folder: Path) -> dict[int, Path]:
    """Files of stored groups by order of admission."""
    return {int(path.stem): path for path in sorted(folder.glob("*.group"))}


def damage(folder: Path, what: Damage | None, chance: Random) -> set[int]:
    """Do it; orders of the groups that can no longer be read."""
    files = orders(folder)
    if what is Damage.LEFTOVER:
        (folder / ".00000001.group.77.tmp").write_bytes(b"half a group")
    if what in (None, Damage.LEFTOVER) or not files:
        return set()
    order, path = chance.choice(list(files.items()))
    data = bytearray(path.read_bytes())
    if what is Damage.LOSE:
        path.unlink()
        return set()
    if what is Damage.CUT:
        path.write_bytes(data[: len(data) // 2])
    else:
        data[chance.randrange(len(data))] ^= 0x10
        path.write_bytes(data)
    return {order}


def usable(folder: Path, schedule: Schedule, admitted: int, step: int, damaged: set[int]) -> tuple[set[int], int]:
    """What a driver must do with the files that it finds when it goes on behind ``step``.

    Returns:
        orders of the groups that it must use when it admits their rows, and how many it must refuse since they have
        tokens of weights that are lost.
    """
    must, lost = set(), 0
    for order, path in orders(folder).items():
        if order < admitted or order in damaged:
            continue
        samples = GroupFile(path).read(prompt(order)).group.samples
        versions = {span.version for sample in samples for span in sample.versions}
        if max(versions) > step:
            lost += 1
        elif min(versions) >= step + (order - admitted) // schedule.groups_per_step - schedule.max_staleness:
            must.add(order)
    return must, lost
