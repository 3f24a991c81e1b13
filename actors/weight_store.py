"""Keeps the last committed push, for actors that were restarted and have only the weights on disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import ray

from actors.push import StoredPush
from vlcot.weights import Bucket


class WeightStore:
    """Owns the buckets of the last push. Plain class; :mod:`actors.pool` makes it a Ray actor.

    Ray frees an object with its owner; owned here, the buckets outlive the learner that sent them.
    """

    def __init__(self) -> None:
        self._committed: StoredPush | None = None
        self._version = -1
        self._layout: tuple[Bucket, ...] = ()
        self._buckets: dict[int, ray.ObjectRef] = {}

    def begin(self, version: int, layout: Sequence[Bucket]) -> int:
        """Expect a push, unless later weights are committed; one that was not committed is dropped.

        A learner that died goes on from its checkpoint and pushes again what it pushed before. Were the actors to go
        back with it, groups that are generated meanwhile would be too old for the step that they are for.

        Returns:
            Version of the last committed push; later than ``version``: the push is not wanted.
        """
        if version >= self.version():
            self._version, self._layout, self._buckets = version, tuple(layout), {}
        return self.version()

    def put(self, index: int, data: np.ndarray) -> list[ray.ObjectRef]:
        """Keep bucket ``index`` (uint8); its reference, in a list (Ray would resolve a bare one)."""
        self._buckets[index] = ray.put(data)
        return [self._buckets[index]]

    def commit(self, checksums: Mapping[str, int]) -> None:
        """The push is what every actor serves from now on."""
        buckets = tuple(self._buckets[index] for index in range(len(self._layout)))
        self._committed = StoredPush(self._version, self._layout, buckets, dict(checksums))
        self._buckets = {}

    def version(self) -> int:
        """Version of the last committed push; 0, the weights on disk, before the first."""
        return self._committed.version if self._committed else 0

    def latest(self) -> StoredPush | None:
        """The last committed push."""
        return self._committed
