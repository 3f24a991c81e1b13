"""Who writes to a run in a store. A lock file would not reach other machines."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from typing import Any

import psutil

from rl_system.runs.store import CLAIM, PROBE, StoredRun, StoreError, reaching

STALE_S = 60.0
"""A claim whose owner has said nothing for so long is free."""
SETTLE_S = 2.0
"""Between writing a claim and believing it: of two attempts that claim at once, the later writer has the run."""


class Claim:
    """This attempt's claim on a run: an object that is written again and again, and that anyone can overwrite.

    Ages are differences of times that the store gives: the clocks of the machines do not matter.
    """

    def __init__(self, stored: StoredRun) -> None:
        self._stored = stored
        self._id = uuid.uuid4().hex
        self._lock = threading.Lock()
        self.held_at = time.monotonic()
        """When the store last said that the run is ours."""

    @classmethod
    def take(cls, stored: StoredRun, wait: Callable[[float], object] = time.sleep) -> Claim:
        """Claim the run.

        Raises:
            ValueError: another attempt has it, or the store cannot be written to.
        """
        claim = cls(stored)
        with reaching(stored.uri):
            if owner := _owner(stored):
                age = _age(stored)
                if age < STALE_S and not _dead(owner):
                    raise ValueError(f"{_held(stored, owner)} {age:.0f} s ago; it is free {STALE_S:.0f} s after that")
            claim._write()
            wait(SETTLE_S)
            owner = _owner(stored)
            if owner is None or owner["attempt"] != claim._id:
                raise ValueError(f"{_held(stored, owner or {})} just now")
        return claim

    def renew(self) -> None:
        """Say that this attempt is alive.

        Raises:
            StoreError: another attempt has the run.
            OSError: the store does not answer.
        """
        with self._lock:
            owner = _owner(self._stored)
            if owner is None or owner["attempt"] != self._id:
                by = f"attempt {_name(owner)}" if owner else "somebody who has removed the claim"
                raise StoreError(f"{self._stored.uri} was taken over by {by}: this attempt writes nothing more to it")
            self._write()
            self.held_at = time.monotonic()

    def release(self) -> None:
        """Give the run free, if it is still ours."""
        with self._lock:
            owner = _owner(self._stored)
            if owner is not None and owner["attempt"] == self._id:
                self._stored.delete(CLAIM)

    def _write(self) -> None:
        process = psutil.Process()
        record = {
            "attempt": self._id,
            "host": socket.gethostname(),
            "pid": process.pid,
            "machine": _machine(),
            "created_s": process.create_time(),
            "time_s": time.time(),
        }
        self._stored.write(CLAIM, json.dumps(record).encode())


def _owner(stored: StoredRun) -> dict[str, Any] | None:
    data = stored.read(CLAIM)
    return None if data is None else dict(json.loads(data))


def _age(stored: StoredRun) -> float:
    """Seconds since the claim was written, by the clock of the store."""
    stored.write(PROBE, b"")
    written, now = (info.mtime for info in stored.files.get_file_info([f"{stored.path}/{n}" for n in (CLAIM, PROBE)]))
    stored.delete(PROBE)
    return 0.0 if written is None or now is None else max(0.0, (now - written).total_seconds())


def _dead(owner: dict[str, Any]) -> bool:
    """Whether the owner was a process of this machine that has ended; of another machine nobody here can say."""
    if owner["machine"] != _machine():
        return False
    try:
        return psutil.Process(owner["pid"]).create_time() != owner["created_s"]
    except psutil.NoSuchProcess:
        return True


def _machine() -> str:
    """This boot and this space of process ids; empty where the system does not say."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return f"{file.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return f"unknown {uuid.uuid4().hex}"


def _name(owner: dict[str, Any]) -> str:
    return f"{owner.get('attempt', '?')[:8]} on {owner.get('host', '?')}, process {owner.get('pid', '?')}"


def _held(stored: StoredRun, owner: dict[str, Any]) -> str:
    return f"{stored.uri} is being written to by attempt {_name(owner)}, last heard of"
