"""One weight push as a rollout actor receives it: buckets become files that vLLM's workers read."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from actors.errors import PushLostError
from vlcot.weights import Bucket

SHARED_MEMORY = Path("/dev/shm")


@dataclass(frozen=True)
class StoredPush:
    """A push that is kept for actors that missed it. ``buckets`` are Ray object references."""

    version: int
    layout: tuple[Bucket, ...]
    buckets: tuple[Any, ...]
    checksums: Mapping[str, int]


@dataclass(frozen=True)
class LoadReport:
    """How one actor took a push.

    Attributes:
        version: that the actor now serves.
        checksums: tensor name -> CRC-32 of what its worker received.
        loaded: parameters whose loaded value was compared (0 under tensor parallelism).
        seconds: wall seconds of ``transfer``, ``verify``, ``load``, ``pause`` and ``resume``.
    """

    version: int
    checksums: Mapping[str, int]
    loaded: int
    seconds: Mapping[str, float]


class IncomingPush:
    """Files of one push on the actor's node; in shared memory where it has room."""

    def __init__(self, version: int, layout: Sequence[Bucket]) -> None:
        self.version = version
        self.started = time.perf_counter()
        self._layout = tuple(layout)
        self._arrived: set[int] = set()
        nbytes = sum(spec.nbytes for bucket in layout for spec in bucket)
        self.directory = Path(tempfile.mkdtemp(prefix=f"vlcot-push-{version}-", dir=_roomy_directory(nbytes)))

    def write(self, index: int, data: np.ndarray) -> None:
        """Store bucket ``index`` (uint8).

        Raises:
            ValueError: no such bucket in the layout.
        """
        if not 0 <= index < len(self._layout):
            raise ValueError(f"bucket {index} of a push of {len(self._layout)} buckets")
        data.tofile(self.directory / f"{index}.bucket")
        self._arrived.add(index)

    def update_info(self, action: str, checksums: Mapping[str, int]) -> dict[str, Any]:
        """The vLLM weight update request (:class:`actors.vllm_plugin.weight_receiver.UpdateInfo`).

        Raises:
            PushLostError: a bucket has not arrived.
        """
        if missing := sorted(set(range(len(self._layout))) - self._arrived):
            raise PushLostError(f"buckets {missing} of push {self.version} have not arrived")
        return {
            "action": action,
            "directory": str(self.directory),
            "layout": [[(s.name, list(s.shape), s.dtype) for s in bucket] for bucket in self._layout],
            "checksums": dict(checksums),
        }

    def worker_report(self) -> dict[str, Any]:
        """What rank 0 wrote; the ranks compare the same checksums."""
        return dict(json.loads((self.directory / "rank0.json").read_text()))

    def discard(self) -> None:
        """Remove the files."""
        shutil.rmtree(self.directory, ignore_errors=True)


def _roomy_directory(nbytes: int) -> Path:
    if SHARED_MEMORY.is_dir() and shutil.disk_usage(SHARED_MEMORY).free > 2 * nbytes:
        return SHARED_MEMORY
    return Path(tempfile.gettempdir())
