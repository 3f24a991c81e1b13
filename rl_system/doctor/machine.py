"""What a machine has: this one, or one that is planned for."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import psutil

CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
SHARED_MEMORY = Path("/dev/shm")
_PLANNED = re.compile(r"(\d+)x(\d+(?:\.\d+)?)")


@dataclass(frozen=True)
class Machine:
    """GPUs and memory.

    Attributes:
        gpus: how many.
        gpu_memory: bytes of the smallest; None where there is no GPU.
        memory: bytes of host memory that processes can get; None: not known.
        shared_memory: bytes free in /dev/shm; None: not known.
        here: it is this machine, so that versions, disks, ports and files can be looked at.
    """

    gpus: int
    gpu_memory: float | None
    memory: float | None
    shared_memory: float | None
    here: bool


def planned(gpus: str, memory_gib: float | None) -> Machine:
    """A machine as the command line names it: ``8x80`` is 8 GPUs of 80 GB (10^9 bytes, as data sheets count).

    Raises:
        ValueError: another form.
    """
    found = _PLANNED.fullmatch(gpus)
    if found is None or int(found[1]) < 1 or float(found[2]) <= 0:
        raise ValueError(f"--gpus {gpus} is not COUNTxGB, such as 8x80")
    return Machine(int(found[1]), float(found[2]) * 1e9, _given(memory_gib), None, here=False)


def _given(memory_gib: float | None) -> float | None:
    """Bytes. Raises ValueError for a number that is not positive."""
    if memory_gib is not None and not memory_gib > 0:
        raise ValueError(f"--memory {memory_gib:g} must be a positive number of GiB")
    return None if memory_gib is None else memory_gib * 2**30


def this_machine(memory_gib: float | None = None) -> Machine:
    """The machine that this runs on; ``memory_gib`` in place of the memory that is free now.

    Raises:
        ValueError: ``memory_gib`` is not positive.
    """
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    # what other processes hold there is not to be had
    free = min((float(torch.cuda.mem_get_info(index)[0]) for index in range(count)), default=None)
    return Machine(
        count, free, _given(memory_gib) or free_memory(), float(shutil.disk_usage(SHARED_MEMORY).free), here=True
    )


def free_memory() -> float:
    """Bytes that new processes can get: of the machine, or what its control group leaves."""
    free = float(psutil.virtual_memory().available)
    if CGROUP_LIMIT.is_file() and (limit := CGROUP_LIMIT.read_text().strip()) != "max":
        used = float((CGROUP_LIMIT.parent / "memory.current").read_text())
        free = min(free, float(limit) - used)
    return free
