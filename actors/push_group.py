"""Buckets of a weight push by broadcast: a process group of the learner's rank 0 and the rollout actors.

The group stands beside the processes' own groups (``torch.distributed`` knows one default group a process, which is the
learner's), so it is made from a store and the backend's class. One membership, one group: after a death or a restart a
new one is made under another name. A dead member breaks the group, a silent one after its time-out; a broken group is
not used again. Who still waits in it is not told, and gives up after the time-out: nobody waits for that.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, Literal, get_args

import numpy as np
import ray
import torch
import torch.distributed as dist

from actors.errors import PushLostError
from actors.push import IncomingPush

PushBackend = Literal["object_store", "gloo", "nccl"]
"""How buckets reach the actors: through Ray's object store, or by broadcast over one of torch's backends."""
PUSH_BACKENDS: tuple[str, ...] = get_args(PushBackend)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Seat:
    """What a process needs to join a group.

    Attributes:
        backend: ``gloo`` or ``nccl``.
        host, port: of the store through which the members meet.
        name: of this group in the store.
        rank, size: of the member; rank 0 sends.
        timeout_s: for meeting, and for each bucket.
    """

    backend: str
    host: str
    port: int
    name: str
    rank: int
    size: int
    timeout_s: float


Call = Callable[[Sequence[Seat | None]], None]
"""Tells the members to receive, in order: each with its seat in a new group, or None in the group that it is in."""


class PushGroup:
    """A member of a group. Blocking; one call at a time.

    Args:
        seat: of this member.
        store: where the members meet; None: connect to the one of the seat.

    Raises:
        PushLostError: the others did not come in time.
    """

    def __init__(self, seat: Seat, store: dist.Store | None = None) -> None:
        self.seat = seat
        self._timeout = timedelta(seconds=seat.timeout_s)
        cuda = seat.backend == "nccl"
        self._device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
        with self._errors("could not be formed"):
            if store is None:
                store = dist.TCPStore(seat.host, seat.port, is_master=False, timeout=self._timeout)
            make = _nccl if cuda else _gloo
            self._group: Any = make(dist.PrefixStore(seat.name, store), seat, self._timeout)

    def send(self, data: np.ndarray) -> None:
        """Rank 0: bucket ``data`` (uint8) to all others.

        Raises:
            PushLostError: a member is dead or silent.
        """
        self._broadcast(torch.from_numpy(data).to(self._device))

    def receive(self, nbytes: int) -> np.ndarray:
        """The others: the next bucket (uint8 [nbytes]).

        Raises:
            PushLostError: a member is dead or silent.
        """
        buffer = torch.empty(nbytes, dtype=torch.uint8, device=self._device)
        self._broadcast(buffer)
        return buffer.cpu().numpy()

    def close(self) -> None:
        """Leave the group. A call that waits in it ends with an error, with gloo only after its time-out."""
        group, self._group = self._group, None
        if group is not None:
            group.abort()

    def _broadcast(self, tensor: torch.Tensor) -> None:
        if self._group is None:
            raise PushLostError(f"push group {self.seat.name} is closed")
        with self._errors("broke"):
            self._group.broadcast(tensor, 0).wait()

    @contextmanager
    def _errors(self, what: str) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # torch has no type of its own for gloo's
            reason = str(error).splitlines()[0]
            raise PushLostError(f"push group {self.seat.name} of {self.seat.size} {what}: {reason}") from error


def receive_all(group: PushGroup | None, push: IncomingPush) -> None:
    """Write the buckets of ``push`` as they come, each while the next is received.

    Raises:
        PushLostError: there is no group, or it breaks.
    """
    if group is None:
        raise PushLostError(f"no push group to receive push {push.version} from")
    with ThreadPoolExecutor(1) as writer:
        written: Future[None] | None = None
        for index, nbytes in enumerate(push.sizes):
            data = group.receive(nbytes)
            if written is not None:
                written.result()
            written = writer.submit(push.write, index, data)
        if written is not None:
            written.result()


class Sender:
    """Rank 0 of one group after another, and the store at which their members meet.

    Args:
        backend: ``gloo`` or ``nccl``.
        host: address of this machine that the members can reach.
        timeout_s: for meeting, and for each bucket.
    """

    def __init__(self, backend: str, host: str, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._store = dist.TCPStore(
            host, 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=timeout_s)
        )
        self._seat = Seat(backend, host, self._store.port, "", 0, 0, timeout_s)
        self._members: tuple[Any, ...] = ()
        self._made = 0
        self._group: PushGroup | None = None

    @property
    def open(self) -> bool:
        """Whether there is a group that is not broken."""
        return self._group is not None

    def gather(self, members: Sequence[Any], call: Call) -> None:
        """Have a group with exactly ``members``: the present one, or a new one; none if it cannot be formed.

        Args:
            members: identify the processes, restarts included.
            call: must not wait for them to join.
        """
        if self.open and tuple(members) == self._members:
            call([None] * len(members))
            return
        self.close()
        if not members:
            return
        self._made += 1
        seat = replace(self._seat, name=f"push-{self._made}", size=1 + len(members))
        call([replace(seat, rank=1 + index) for index in range(len(members))])
        try:
            self._group, self._members = PushGroup(seat, self._store), tuple(members)
        except PushLostError as error:
            self._lost(error)

    def send(self, data: np.ndarray) -> None:
        """Broadcast a bucket (uint8); without a group, nothing. A group that breaks is closed, and the log says so."""
        if self._group is None:
            return
        try:
            self._group.send(data)
        except PushLostError as error:
            self._lost(error)

    def close(self) -> None:
        """Leave the group."""
        if self._group is not None:
            self._group.close()
            self._group = None

    def _lost(self, error: PushLostError) -> None:
        log.warning("%s; the actors leave this push, and the pool brings them up to date", error)
        self.close()


def _gloo(store: dist.Store, seat: Seat, timeout: timedelta) -> Any:
    options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._timeout = timeout
    # The address that Ray knows this machine by: by its name, gloo may take a network that others cannot reach.
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=ray.util.get_node_ip_address())]
    return dist.ProcessGroupGloo(store, seat.rank, seat.size, options)


def _nccl(store: dist.Store, seat: Seat, timeout: timedelta) -> Any:
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timeout
    with _blocking_wait():
        return dist.ProcessGroupNCCL(store, seat.rank, seat.size, options)


@contextmanager
def _blocking_wait() -> Iterator[None]:
    """A group made inside raises in ``wait`` after its time-out, where NCCL's watchdog would end the process."""
    name = "TORCH_NCCL_BLOCKING_WAIT"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
