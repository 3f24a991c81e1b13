"""The learner's end of a weight push: from buckets to every rollout actor."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import ray
from ray.actor import ActorHandle
from ray.exceptions import RayActorError

from actors.errors import EngineLostError, PushLostError
from actors.push import LoadReport
from actors.push_group import PushBackend, Seat, Sender
from vlcot.weights import Bucket, PushReport

PHASES = ("transfer", "verify", "pause", "load", "resume")
OPEN_BUCKETS = 2
"""On their way to the store at a time: the learner gathers the next one meanwhile."""


class ActorWeightSink:
    """A :class:`vlcot.weights.WeightSink` over rollout actors. Picklable.

    An actor that dies during a push is left out of it: the pool brings it up to date from the store before it
    serves again. A push of weights older than those that the actors serve goes nowhere. One push at a time.

    Args:
        actors: handles of :class:`actors.rollout_actor.RolloutActor`.
        store: handle of :class:`actors.weight_store.WeightStore`.
        timeout_s: for each phase, after which the push fails.
        backend: how buckets reach the actors. By broadcast, the store has its copy for those that missed the push.
        bucket_timeout_s: for a bucket to be broadcast, and for the actors to meet for it.
    """

    def __init__(
        self,
        actors: Sequence[ActorHandle],
        store: ActorHandle,
        timeout_s: float = 600.0,
        backend: PushBackend = "object_store",
        bucket_timeout_s: float = 60.0,
    ) -> None:
        self._backend = backend
        self._bucket_timeout_s = bucket_timeout_s
        self._sender: Sender | None = None
        self._actors = list(actors)
        self._store = store
        self._timeout_s = timeout_s
        self._version = -1
        self._served = 0
        self._nbytes = 0
        self._live: list[ActorHandle] = []
        self._calls: list[tuple[ActorHandle, Any]] = []
        self._stored: list[Any] = []

    def begin(self, version: int, layout: Sequence[Bucket]) -> None:
        """Announce a push to all actors.

        Raises:
            ValueError: the version is below 1 (0 are the weights on disk).
        """
        if version < 1:
            raise ValueError(f"a pushed weight version must be at least 1, got {version}")
        layout = tuple(layout)
        self._version = version
        self._nbytes = sum(spec.nbytes for bucket in layout for spec in bucket)
        self._served = ray.get(self._store.begin.remote(version, layout), timeout=self._timeout_s)
        self._live = [] if self._served > version else list(self._actors)
        self._calls, self._stored = [], []
        self._call_all(lambda actor: actor.begin.remote(version, layout))
        if self._backend != "object_store" and self._live:
            self._gather()

    def send(self, index: int, data: np.ndarray) -> None:
        """Hand over bucket ``index``: stored once, and fetched by every actor; returns before it has arrived. Or
        broadcast: returns when it was sent.

        Raises:
            ray.exceptions.GetTimeoutError: an earlier bucket was not stored in time.
        """
        if self._served > self._version:
            return
        if len(self._stored) == OPEN_BUCKETS:
            ray.get(self._stored.pop(0), timeout=self._timeout_s)
        stored = self._store.put.remote(index, data)
        self._stored.append(stored)
        if self._sender is None:
            self._call_all(lambda actor: actor.fetch.remote(self._version, index, stored))
        else:
            self._sender.send(data)
            self._leave_a_broken_group()

    def finish(self, checksums: Mapping[str, int]) -> PushReport:
        """Load on every live actor, verify each tensor, serve the new version.

        Raises:
            RuntimeError: a checksum differs or loading failed, with the tensor and the actor.
            ray.exceptions.GetTimeoutError: an actor did not answer in time.
        """
        if self._served > self._version:
            return PushReport(self._served, dict.fromkeys(PHASES, 0.0), 0, 0)
        self._collect()
        self._call_all(lambda actor: actor.finish.remote(self._version, dict(checksums)))
        reports: list[LoadReport] = self._collect()
        for report in reports:
            _compare(report.checksums, checksums)
        ray.get(self._store.commit.remote(dict(checksums)), timeout=self._timeout_s)
        seconds = {phase: max((r.seconds[phase] for r in reports), default=0.0) for phase in PHASES}
        return PushReport(self._version, seconds, self._nbytes, len(reports))

    def _gather(self) -> None:
        """Meet with the processes of the actors that are there; each then waits for the buckets."""
        processes = self._collect()
        if self._sender is None:
            self._sender = Sender(self._backend, ray.util.get_node_ip_address(), self._bucket_timeout_s)
        self._sender.gather(processes, self._call)
        self._leave_a_broken_group()

    def _call(self, seats: Sequence[Seat | None]) -> None:
        self._calls += [
            (actor, actor.take.remote(self._version, seat)) for actor, seat in zip(self._live, seats, strict=True)
        ]

    def _leave_a_broken_group(self) -> None:
        """Nobody can have all buckets; some may wait for the next one until their time-out."""
        if self._sender is not None and not self._sender.open:
            self._live, self._calls = [], []

    def _call_all(self, call: Callable[[ActorHandle], Any]) -> None:
        self._calls += [(actor, call(actor)) for actor in self._live]

    def _collect(self) -> list[Any]:
        """Results of the open calls; an actor that died, lost its engine or the push by a restart, leaves the push."""
        results = []
        for actor, reference in self._calls:
            try:
                results.append(ray.get(reference, timeout=self._timeout_s))
            except (RayActorError, EngineLostError, PushLostError):
                self._live = [other for other in self._live if other != actor]
        self._calls = []
        return results


def _compare(received: Mapping[str, int], sent: Mapping[str, int]) -> None:
    wrong = sorted(name for name in received.keys() | sent.keys() if received.get(name) != sent.get(name))
    if wrong:
        raise RuntimeError(f"tensor {wrong[0]}: an actor's checksum is not the learner's ({len(wrong)} tensors differ)")
