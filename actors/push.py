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
from vlcot.weights import Bucket, bucket_checksums

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
        checksums: tensor name -> XXH3 of what its worker received.
        loaded: parameters whose loaded value was compared (0 under tensor parallelism).
        seconds: wall seconds of ``transfer`` (begin to the last bucket), ``verify`` (checksums of what arrived, part of
            the transfer), ``pause``, ``load`` (with the check of what was loaded) and ``resume``; generation stands
            still in the last three.
    """

    version: int
    checksums: Mapping[str, int]
    loaded: int
    seconds: Mapping[str, float]


class IncomingPush:
    """Files of one push on the actor's node; in shared memory where it has room."""

    def __init__(self, version: int, layout: Sequence[Bucket]) -> None:
        self.version = version
        self._layout = tuple(layout)
        self._arrived: dict[int, dict[str, int]] = {}
        self._started = self._last = time.perf_counter()
        self._verify_s = 0.0
        nbytes = sum(spec.nbytes for bucket in layout for spec in bucket)
        self.directory = Path(tempfile.mkdtemp(prefix=f"vlcot-push-{version}-", dir=_roomy_directory(nbytes)))

    @property
    def sizes(self) -> list[int]:
        """Bytes of each bucket."""
        return [sum(spec.nbytes for spec in bucket) for bucket in self._layout]

    def write(self, index: int, data: np.ndarray) -> None:
        """Store bucket ``index`` (uint8) and take the checksum of each of its tensors.

        Raises:
            ValueError: no such bucket in the layout, or not its size.
        """
        if not 0 <= index < len(self._layout):
            raise ValueError(f"bucket {index} of a push of {len(self._layout)} buckets")
        started = time.perf_counter()
        sums = bucket_checksums(self._layout[index], data)
        self._verify_s += time.perf_counter() - started
        data.tofile(self.directory / f"{index}.bucket")
        self._arrived[index] = sums
        self._last = time.perf_counter()

    def check(self, sent: Mapping[str, int]) -> dict[str, int]:
        """Compare with the sender's checksums; those of what arrived.

        Raises:
            PushLostError: a bucket has not arrived.
            ValueError: a tensor is not what was sent, by name.
        """
        if missing := sorted(set(range(len(self._layout))) - self._arrived.keys()):
            raise PushLostError(f"buckets {missing} of push {self.version} have not arrived")
        arrived = {name: value for sums in self._arrived.values() for name, value in sums.items()}
        wrong = sorted(name for name in arrived.keys() | sent.keys() if arrived.get(name) != sent.get(name))
        if wrong:
            raise ValueError(f"tensor {wrong[0]}: the checksum of what arrived is not the sender's")
        return arrived

    def update_info(self) -> dict[str, Any]:
        """The vLLM weight update request (:class:`actors.vllm_plugin.weight_receiver.UpdateInfo`)."""
        return {
            "directory": str(self.directory),
            "layout": [[(s.name, list(s.shape), s.dtype) for s in bucket] for bucket in self._layout],
            "checksums": {name: value for sums in self._arrived.values() for name, value in sums.items()},
        }

    def loaded(self) -> int:
        """Parameters that rank 0 compared after loading."""
        return int(json.loads((self.directory / "rank0.json").read_text())["loaded"])

    def seconds(self) -> dict[str, float]:
        """``transfer`` and ``verify`` of :class:`LoadReport`."""
        return {"transfer": self._last - self._started, "verify": self._verify_s}

    def discard(self) -> None:
        """Remove the files."""
        shutil.rmtree(self.directory, ignore_errors=True)


def _roomy_directory(nbytes: int) -> Path:
    if SHARED_MEMORY.is_dir() and shutil.disk_usage(SHARED_MEMORY).free > 2 * nbytes:
        return SHARED_MEMORY
    return Path(tempfile.gettempdir())
