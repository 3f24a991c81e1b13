"""``python -m rl_system.k8s.drain SECONDS``: a worker pod's preStop hook.

Tells Ray that this node goes away, so that Serve moves its replicas and Ray Train makes a checkpoint, then waits until
nothing but Ray itself runs here, or the deadline. Ray's drain call is not public API (Ray 2.60).
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterable
from importlib import import_module
from typing import Any

POLL_S = 2.0
ALIVE = 0
"""``GcsNodeInfo.ALIVE``"""


def main(argv: list[str]) -> int:
    """Drain the node of this pod, at most ``argv[0]`` seconds; returns 0, also when Ray is already gone."""
    deadline = time.monotonic() + float(argv[0])
    address = os.environ["RAY_ADDRESS"]
    node = own_node(_nodes(address), os.environ["RAY_CLOUD_INSTANCE_ID"])
    if node is None:
        return 0
    command = ["ray", "drain-node", "--address", address, "--node-id", node]
    command += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "the pod is being stopped"]
    subprocess.run([*command, "--deadline-remaining-seconds", argv[0]], check=True)
    while time.monotonic() < deadline and any(n.node_id.hex() == node and n.state == ALIVE for n in _nodes(address)):
        time.sleep(POLL_S)
    return 0


def own_node(nodes: Iterable[Any], instance_id: str) -> str | None:
    """Hexadecimal id of the live node whose pod is ``instance_id``; None if Ray does not list it as alive."""
    for node in nodes:
        if node.state == ALIVE and node.instance_id == instance_id:
            return str(node.node_id.hex())
    return None


def _nodes(address: str) -> list[Any]:
    raylet: Any = import_module("ray._raylet")
    return list(raylet.GcsClient(address=address).get_all_node_info().values())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
