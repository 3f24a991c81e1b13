"""Memory that a process of each kind has without its model: libraries, runtimes, threads.

Measured, not derived: ``benchmarks/memory_plan.py`` runs the toy with next to no models and subtracts what the plan
says of those. On a CPU a process is mostly this.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import yaml

FILE = Path(__file__).parent / "bases.yaml"


@dataclass(frozen=True)
class Base:
    """Bytes of a process without shared memory: ``resident`` counts libraries in each process, ``private`` in none."""

    resident: float
    private: float


@cache
def read_bases(file: Path = FILE) -> Mapping[str, Base]:
    """Kind of process -> its base."""
    mib = yaml.safe_load(file.read_text(encoding="utf-8"))["mib"]
    return {kind: Base(resident * 2**20, private * 2**20) for kind, (resident, private) in mib.items()}
