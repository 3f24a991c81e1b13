"""The other side of a learner group as real Ray actors: a queue of batches and a receiver of weights."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import ray.train
import torch

from learners.protocols import LearnerStart
from vlcot.groups import ScoredGroup
from vlcot.weights import Bucket, PushReport, checksums, unpack


@ray.remote(num_cpus=0)
class Counterpart:
    """Serves batches by step, receives weights, and writes down everything that it hears."""

    def __init__(self, batches: Mapping[int, list[ScoredGroup]], kill_at: int) -> None:
        self._batches = batches
        self._kill_at = kill_at
        self.starts: list[LearnerStart] = []
        self.reports: list[tuple[int, dict[str, float]]] = []
        self.checkpoints: list[int] = []
        self.pushed: list[int] = []
        self.weights: dict[int, dict[str, torch.Tensor]] = {}
        self._incoming: tuple[int, Sequence[Bucket], dict[str, torch.Tensor]] | None = None

    def next_batch(self, step: int) -> list[ScoredGroup] | None:
        return self._batches.get(step)

    def should_die(self, step: int) -> bool:
        """True once, at ``kill_at``."""
        if step != self._kill_at:
            return False
        self._kill_at = -1
        return True

    def begin(self, version: int, layout: Sequence[Bucket]) -> None:
        self._incoming = version, layout, {}

    def send(self, index: int, data: np.ndarray) -> None:
        _, layout, tensors = self._incoming
        tensors.update(unpack(layout[index], data.copy()))

    def finish(self, expected: Mapping[str, int]) -> PushReport:
        version, layout, tensors = self._incoming
        if checksums(tensors.items()) != dict(expected):
            raise RuntimeError("the weights that came are not those that were sent")
        self.weights[version] = tensors
        self.pushed.append(version)
        nbytes = sum(spec.nbytes for bucket in layout for spec in bucket)
        return PushReport(version, {"load": 0.001}, nbytes, 1)

    def started(self, start: LearnerStart) -> None:
        self.starts.append(start)

    def report(self, step: int, metrics: dict[str, float]) -> None:
        self.reports.append((step, metrics))

    def reported(self, step: int) -> bool:
        return any(done == step for done, _ in self.reports)

    def checkpointing(self, step: int) -> None:
        assert self.reported(step) and step not in self.checkpoints[-1:]

    def checkpointed(self, step: int) -> None:
        self.checkpoints.append(step)

    def seen(self) -> dict[str, Any]:
        """All that was written down."""
        names = ("starts", "reports", "checkpoints", "pushed", "weights")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class Remote:
    """Batch source, weight sink and progress sink in one: forwards to a :class:`Counterpart`."""

    actor: Any

    def next_batch(self, step: int) -> list[ScoredGroup] | None:
        if ray.train.get_context().get_world_rank() == 1 and ray.get(self.actor.should_die.remote(step)):
            # Rank 0 reports a step once it is pushed, and nothing else keeps this rank from being ahead of it.
            while step > 1 and not ray.get(self.actor.reported.remote(step - 1)):
                time.sleep(0.05)
            os._exit(9)
        return ray.get(self.actor.next_batch.remote(step))

    def begin(self, version: int, layout: Sequence[Bucket]) -> None:
        ray.get(self.actor.begin.remote(version, layout))

    def send(self, index: int, data: np.ndarray) -> None:
        ray.get(self.actor.send.remote(index, data))

    def finish(self, checksums: Mapping[str, int]) -> PushReport:
        return ray.get(self.actor.finish.remote(checksums))

    def started(self, start: LearnerStart) -> None:
        ray.get(self.actor.started.remote(start))

    def report(self, step: int, metrics: dict[str, float]) -> None:
        ray.get(self.actor.report.remote(step, metrics))

    def checkpointing(self, step: int) -> None:
        ray.get(self.actor.checkpointing.remote(step))

    def checkpointed(self, step: int) -> None:
        ray.get(self.actor.checkpointed.remote(step))
