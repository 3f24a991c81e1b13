"""The preStop hook against a real Ray, one raylet standing for a pod."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.engine


def test_a_stopping_pod_drains_its_own_node_and_no_other():
    from ray._raylet import GcsClient
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        nodes = {
            pod: cluster.add_node(num_cpus=1, env_vars={"RAY_CLOUD_INSTANCE_ID": pod}) for pod in ("pod-a", "pod-b")
        }
        cluster.wait_for_nodes()
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"

        def hook(pod: str) -> int:
            environment = os.environ | {"PATH": path, "RAY_ADDRESS": cluster.address, "RAY_CLOUD_INSTANCE_ID": pod}
            return subprocess.run(
                [sys.executable, "-m", "rl_system.k8s.drain", "5"], env=environment, timeout=180
            ).returncode

        gcs = GcsClient(address=cluster.address)
        assert hook("pod-of-another-cluster") == 0
        assert gcs.get_draining_nodes() == {}
        assert hook("pod-a") == 0
        left = set(gcs.get_draining_nodes()) | {
            info.node_id.hex() for info in gcs.get_all_node_info().values() if info.state
        }
        assert left == {nodes["pod-a"].node_id}
    finally:
        cluster.shutdown()
