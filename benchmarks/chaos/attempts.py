"""Attempts at a toy run, and Ray clusters for them, as processes that are started and ended here."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import TypeVar

import psutil

from benchmarks.chaos.evidence import Target
from benchmarks.chaos.processes import Descendants
from rl_system.runs.sinks import read_metrics

T = TypeVar("T")

TARGET = Target(steps=10, groups_per_step=2, max_staleness=1)
SETTINGS = [
    f"learner.steps={TARGET.steps}",
    f"learner.groups_per_step={TARGET.groups_per_step}",
    f"coordination.max_staleness={TARGET.max_staleness}",
    "learner.checkpoint_every=2",
    "learner.warmup_steps=0",
    "evaluation.prompts=2",
    "evaluation.pictures=1",
    "kept_groups=1",
    "resume=auto",
]
ENVIRONMENT = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "HF_HUB_OFFLINE": "1"}
POLL_S, LOOK_S = 0.1, 1.0
"""Between two looks at files and exit codes, and at the table of processes, which costs more."""
LONGEST_S = 420.0
"""After which an attempt is given up."""


class ChaosError(RuntimeError):
    """A case could not be carried through; says why."""


class Started:
    """A command and all processes below it. As a context manager it ends them; killed here are only these."""

    def __init__(self, command: list[str], log: Path, **environment: str) -> None:
        inherited = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        self._log = log
        with log.open("ab") as out:
            self.process = subprocess.Popen(
                command, env=inherited | ENVIRONMENT | environment, stdout=out, stderr=subprocess.STDOUT
            )
        self.all = Descendants(self.process.pid)
        self._looked_s = time.monotonic()

    def __enter__(self) -> Started:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self.all.kill():
            time.sleep(POLL_S)
        self.process.wait()

    def wait_until(self, found: Callable[[], T], seconds: float, what: str, every_s: float = POLL_S) -> T:
        """Poll until the answer is true; that answer.

        Raises:
            ChaosError: it ended first, or the time is over.
        """
        deadline = time.monotonic() + seconds
        while not (answer := found()):
            self._look()
            if self.process.poll() is not None:
                raise ChaosError(f"it ended with {self.process.returncode} before {what}: {self.last_words()}")
            if time.monotonic() > deadline:
                raise ChaosError(f"{seconds:g} s were not enough until {what}: {self.last_words()}")
            time.sleep(every_s)
        return answer

    def end(self) -> int:
        """Wait for the end; the exit code.

        Raises:
            ChaosError: it takes too long.
        """
        deadline = time.monotonic() + LONGEST_S
        while self.process.poll() is None:
            if time.monotonic() > deadline:
                raise ChaosError(f"still running after {LONGEST_S:g} s: {self.last_words()}")
            self._look()
            time.sleep(POLL_S)
        return self.process.returncode

    def left_after(self, seconds: float) -> list[str]:
        """Titles of the processes that live so long after the end of the command."""
        deadline = time.monotonic() + seconds
        while (rows := self.all.rows()) and time.monotonic() < deadline:
            time.sleep(LOOK_S)
        return [row.title[:60] for row in rows]

    def _look(self) -> None:
        if time.monotonic() - self._looked_s > LOOK_S:
            self.all.look()
            self._looked_s = time.monotonic()

    def last_words(self) -> str:
        """End of what it printed."""
        return " / ".join(self._log.read_text(errors="replace").strip().splitlines()[-4:])[-600:]


class Attempt(Started):
    """``rl-system train``: starts or goes on with the run ``name``, in its own Ray or the cluster of ``head``."""

    def __init__(self, folder: Path, name: str, seed: int, head: ClusterNode | None = None) -> None:
        command = [sys.executable, "-m", "rl_system", "train", "experiment=toy", f"name={name}", f"seed={seed}"]
        command += [f"output_dir={folder}", *SETTINGS]
        log = folder / f"{name}.log"
        if head is None:
            super().__init__(command, log)
        else:
            super().__init__([*command, "cluster=job"], log, RAY_ADDRESS=head.address)
        self.run = folder / name

    def step(self) -> int:
        """Last step that was reported; 0 before the first."""
        return max((metrics.step for metrics in read_metrics(self.run / "metrics.jsonl")), default=0)

    def wait_for_step(self, step: int) -> None:
        """Return as soon as ``step`` is reported."""
        self.wait_until(lambda: self.step() >= step, LONGEST_S, f"step {step} was reported")


class ClusterNode(Started):
    """A Ray node on the loopback interface, in its own processes: a head without CPUs, or a worker of one.

    Its files are in a folder of its own, so that ``ray.init()`` elsewhere on the machine does not find it.
    """

    def __init__(self, folder: Path, name: str, head: ClusterNode | None = None) -> None:
        ports = iter(_free_ports(3))
        command = [str(Path(sys.executable).with_name("ray")), "start", "--block", "--node-ip-address=127.0.0.1"]
        command += [f"--dashboard-agent-listen-port={next(ports)}", f"--object-store-memory={300 << 20}"]
        if head is None:
            self.address = f"127.0.0.1:{next(ports)}"
            command += ["--head", "--num-cpus=0", f"--port={self.address.split(':')[1]}"]
            command += [f"--ray-client-server-port={next(ports)}", "--include-dashboard=false"]
            command += [f"--temp-dir={folder}"]
        else:
            self.address = head.address
            command += [f"--address={self.address}", "--num-cpus=16"]
        super().__init__(command, folder / f"{name}.log", RAY_worker_niceness="0")
        self.wait_until(lambda: b"Ray runtime started" in self._log.read_bytes(), 60, "the node had started")


def kill_at_once(*started: Started) -> float:
    """SIGKILL to all processes of all of them, as when their machine is lost; when that was, epoch seconds."""
    when = time.time()
    for each in started:
        each.all.kill()
    return when


def kill_process(pid: int) -> float:
    """SIGKILL to one process; when that was, epoch seconds."""
    when = time.time()
    psutil.Process(pid).kill()
    return when


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()
