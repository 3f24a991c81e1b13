"""Ray clusters that ``ray start`` makes: of their own, with a token, ports and a temporary folder."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from tests.processes import alive, free_ports

BIN = Path(sys.executable).parent


@dataclass
class HeadNode:
    """The head of a cluster, and the nodes that have joined it."""

    process: subprocess.Popen[bytes]
    url: str
    port: int
    cwd: Path
    said: Path
    environment: dict[str, str]
    metrics_ports: list[int]
    joined: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def ask(self, path: str, put: Any = None) -> Any:
        """What the dashboard answers to a GET, or to a PUT of ``put``; None for an empty answer."""
        headers = {"Authorization": f"Bearer {self.environment['RAY_AUTH_TOKEN']}", "Content-Type": "application/json"}
        body = None if put is None else json.dumps(put).encode()
        request = urllib.request.Request(self.url + path, body, headers, method="GET" if put is None else "PUT")
        with urllib.request.urlopen(request, timeout=60) as answer:
            text = answer.read()
        return json.loads(text) if text else None

    def metrics(self) -> list[str]:
        """What the Prometheus endpoint of each node says; an endpoint that is not up yet says nothing."""
        texts = []
        for port in self.metrics_ports:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
                    texts.append(answer.read().decode())
            except (urllib.error.URLError, ConnectionError):
                texts.append("")
        return texts

    def join(self, cpus: int, labels: Mapping[str, str]) -> None:
        """Start a node and wait for it: of two that start at once on one machine, one may not come up."""
        before = self.nodes()
        agent, metrics = free_ports(2)
        self.metrics_ports.append(metrics)
        address = [f"--address=127.0.0.1:{self.port}", "--node-ip-address=127.0.0.1"]
        ports = [f"--dashboard-agent-listen-port={agent}", f"--metrics-export-port={metrics}"]
        ports += ["--min-worker-port=0", "--max-worker-port=0"]
        arguments = [*address, *ports, *_size(cpus, labels)]
        self.joined.append(_ray_start(arguments, self.environment, self.cwd, self.said))
        wait_for(lambda: self.nodes() > before, self.joined[-1], 180, self.said)

    def nodes(self) -> int:
        """How many of them live, by the cluster's own word; 0 while it says nothing."""
        try:
            found = self.ask("/nodes?view=summary")["data"]["summary"]
        except (urllib.error.URLError, ConnectionError):
            return 0
        return sum(node["raylet"].get("state") == "ALIVE" for node in found)


def wait_for(
    condition: Callable[[], Any], process: subprocess.Popen[Any], timeout_s: float, said: Path | None = None
) -> None:
    """Until ``condition`` holds; ``process``, whose output is in ``said``, must live."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        text = said.read_text()[-4000:] if said is not None else ""
        assert process.poll() is None, f"the process has ended\n{text}"
        assert time.monotonic() < deadline, f"nothing for {timeout_s:.0f} s\n{text}"
        time.sleep(0.2)


@contextmanager
def head_node(
    cwd: Path, cpus: int = 8, labels: Mapping[str, str] | None = None, **variables: str
) -> Iterator[HeadNode]:
    """A cluster of one node, ended with all that has joined it.

    Args:
        cwd: working directory of Ray and of its workers.
        variables: of their environment, beside a token of their own.
    """
    folder = tempfile.mkdtemp(prefix="r", dir="/tmp")  # sockets have short paths
    port, dashboard, agent, client, metrics = free_ports(5)
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "RAY_ADDRESS")}
    environment |= {
        "PATH": f"{BIN}:{os.environ['PATH']}",  # where a job finds `python`
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        **variables,
    }
    address = ["--head", "--node-ip-address=127.0.0.1", f"--port={port}"]
    board = ["--include-dashboard=true", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"]
    others = [f"--dashboard-agent-listen-port={agent}", f"--ray-client-server-port={client}", f"--temp-dir={folder}"]
    others += [f"--metrics-export-port={metrics}", "--min-worker-port=0", "--max-worker-port=0"]
    said = Path(folder) / "said.log"
    process = _ray_start([*address, *board, *others, *_size(cpus, labels or {})], environment, cwd, said)
    node = HeadNode(process, f"http://127.0.0.1:{dashboard}", port, cwd, said, environment, [metrics])
    try:
        wait_for(node.nodes, process, 180, said)
        wait_for(lambda: _listens(agent), process, 180, said)  # Ray refuses jobs until it does
        yield node
    finally:
        _end([*node.joined, process])
        shutil.rmtree(folder, ignore_errors=True)


def _size(cpus: int, labels: Mapping[str, str]) -> list[str]:
    said = ",".join(f"{key}={value}" for key, value in labels.items())
    return [f"--num-cpus={cpus}", *([f"--labels={said}"] if said else [])]


def _ray_start(arguments: list[str], environment: dict[str, str], cwd: Path, said: Path) -> subprocess.Popen[bytes]:
    with said.open("ab") as file:
        return subprocess.Popen(
            [str(BIN / "ray"), "start", "--block", "--disable-usage-stats", *arguments],
            env=environment,
            cwd=cwd,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _end(started: list[subprocess.Popen[bytes]]) -> None:
    """Each with its children, whichever way a node has ended before."""
    running = [psutil.Process(process.pid) for process in started if process.poll() is None]
    children = [child for process in running for child in process.children(recursive=True)]
    for process in running:
        process.send_signal(signal.SIGTERM)
    _, left = psutil.wait_procs([*running, *children], timeout=15)
    for child in left:
        if alive(child):
            child.kill()
    for ended in started:
        ended.wait(timeout=15)


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
