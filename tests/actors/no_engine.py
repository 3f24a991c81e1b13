"""A rollout actor without an engine: pushes as they are, and in place of vLLM what it would have loaded."""

from __future__ import annotations

import asyncio
import json
import os
import uuid
from collections.abc import Sequence
from typing import Any

import numpy as np

from actors.errors import StaleWeightsError
from actors.push import IncomingPush
from actors.rollout_actor import RolloutActor
from vlcot.weights import Bucket, bucket_checksums


class NoEngine(RolloutActor):
    """Serves its version as the answer to every prompt."""

    def __init__(self, spec: Any, index: int) -> None:
        self.name = f"rollout-{index}"
        self._version, self._sums, self._dies_at = 0, {}, -1
        self._pushes, self._process = {}, uuid.uuid4().hex
        self._group, self._loading = None, asyncio.Lock()
        self._totals = {"pushes": 0}

    async def ready(self) -> dict[str, Any]:
        return {}

    def shutdown(self) -> None:
        if self._group is not None:
            self._group.close()

    async def statistics(self) -> dict[str, float]:
        return {"weight_version": self._version}

    async def generate(self, prompt: Any, minimum_version: int = 0) -> int:
        if self._version < minimum_version:
            raise StaleWeightsError(f"{self.name} has weights {self._version}")
        return self._version

    async def die_at(self, index: int) -> None:
        """End the process without a word when that bucket of the next push has come."""
        self._dies_at = index

    async def served(self) -> tuple[int, dict[str, int]]:
        """Version and checksums of what was loaded."""
        return self._version, self._sums

    async def begin(self, version: int, layout: Sequence[Bucket]) -> str:
        process = await super().begin(version, layout)
        write = self._pushes[version].write

        def dying(index: int, data: np.ndarray) -> None:
            if index == self._dies_at:
                os._exit(9)
            write(index, data)

        self._pushes[version].write = dying
        return process

    async def _load(self, push: IncomingPush) -> dict[str, float]:
        self._sums = {}
        for index, bucket in enumerate(push._layout):
            self._sums |= bucket_checksums(bucket, np.fromfile(push.directory / f"{index}.bucket", np.uint8))
        (push.directory / "rank0.json").write_text(json.dumps({"loaded": len(self._sums)}))
        self._version = push.version
        return {"pause": 0.0, "load": 0.0, "resume": 0.0}
