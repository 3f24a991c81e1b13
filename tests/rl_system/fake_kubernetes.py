"""Ray's autoscaler on a rendered manifest, with raylets of this machine in place of pods.

    python -m tests.rl_system.fake_kubernetes OVERLAY

prints one JSON object a line: pods by group after each change of the load, and what the autoscaler says of a request
that fits no group. The autoscaler is the real one (v2); of Kubernetes it needs three calls, which are answered here,
and of the KubeRay operator that a pod follows for each replica.
"""

from __future__ import annotations

import copy
import json
import os
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ |= {"AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_AUTH_MODE": "disabled"}

import ray
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler._private.kuberay.node_provider import IKubernetesHttpApiClient
from ray.autoscaler.v2.instance_manager.cloud_providers.kuberay import cloud_provider
from ray.autoscaler.v2.instance_manager.config import KubeRayConfigReader
from ray.autoscaler.v2.monitor import AutoscalerMonitor
from ray.cluster_utils import Cluster

from rl_system.k8s.manifests import clusters, render

IDLE_S = 4
NAME = "cluster"


class FakeKubernetes(IKubernetesHttpApiClient):
    """The API server and the operator."""

    def __init__(self, resource: dict[str, Any], cluster: Cluster) -> None:
        self.resource = resource
        self._cluster = cluster
        self._types = _derive_autoscaling_config_from_ray_cr(resource)["available_node_types"]
        self._pods = {"head": _pod("head", "head", "headgroup")}
        self._nodes: dict[str, Any] = {}
        self._made = 0
        self._lock = threading.RLock()

    def get(self, path: str) -> dict[str, Any]:
        with self._lock:
            if path.startswith("rayclusters/"):
                return copy.deepcopy(self.resource)
            return {"metadata": {"resourceVersion": "1"}, "items": copy.deepcopy(list(self._pods.values()))}

    def patch(self, path: str, payload: list[dict[str, Any]], content_type: str = "") -> dict[str, Any]:
        with self._lock:
            for change in payload:
                *_, index, name = change["path"].split("/")
                self.resource["spec"]["workerGroupSpecs"][int(index)][name] = change["value"]
            return self.get("rayclusters/")

    def delete(self, path: str) -> dict[str, Any]:
        raise AssertionError(f"the autoscaler scales by patches, and asked to delete {path}")

    def reconcile(self) -> None:
        """What the operator does. On the main thread: Ray's nodes install signal handlers."""
        with self._lock:
            groups = copy.deepcopy(self.resource["spec"]["workerGroupSpecs"])
        for group in groups:
            name = group["groupName"]
            for pod in (group.get("scaleStrategy") or {}).get("workersToDelete", []):
                if pod in self._pods:
                    with self._lock:
                        del self._pods[pod]
                    self._cluster.remove_node(self._nodes.pop(pod))
            have = sum(pod.startswith(f"{name}-") for pod in self._pods)
            for _ in range(group.get("replicas", 0) - have):
                self._start(name)

    def _start(self, group: str) -> None:
        self._made += 1
        pod = f"{group}-{self._made}"
        resources = dict(self._types[group]["resources"])
        resources.pop("memory", None)
        with self._lock:  # first: a raylet without its pod is counted beside the one that is awaited
            self._pods[pod] = _pod(pod, "worker", group)
        self._nodes[pod] = self._cluster.add_node(
            wait=False,
            num_cpus=resources.pop("CPU"),
            num_gpus=resources.pop("GPU", 0),
            resources=resources,
            labels=self._types[group]["labels"],
            env_vars={"RAY_CLOUD_INSTANCE_ID": pod, "RAY_NODE_TYPE_NAME": group},
        )


def _pod(name: str, kind: str, group: str) -> dict[str, Any]:
    labels = {"ray.io/node-type": kind, "ray.io/group": group, "ray.io/cluster": NAME}
    running = {"containerStatuses": [{"state": {"running": {}}}]}
    containers = [{"name": "ray", "resources": {}}]
    return {"metadata": {"name": name, "labels": labels}, "status": running, "spec": {"containers": containers}}


def resource_of(overlay: Path) -> dict[str, Any]:
    """The overlay's training cluster, its reward pools allowed to shrink to nothing within seconds."""
    cluster = next(c for c in clusters(render(overlay)) if c.manifest.kind in ("RayJob", "RayCluster"))
    spec = cluster.spec
    for group in spec["workerGroupSpecs"]:
        group["replicas"] = group["minReplicas"]
        if group["groupName"].startswith("reward-"):
            group |= {"replicas": 0, "minReplicas": 0, "idleTimeoutSeconds": IDLE_S}
    return {"apiVersion": "ray.io/v1", "kind": "RayCluster", "metadata": {"name": NAME, "namespace": "x"}, "spec": spec}


@ray.remote
class Replica:
    """What a reward server's replica is to the autoscaler."""

    def ready(self) -> bool:
        return True


def pools() -> dict[str, int]:
    return dict(Counter(n["Labels"]["rl.io/pool"] for n in ray.nodes() if n["Alive"] and "rl.io/pool" in n["Labels"]))


def main(overlay: Path) -> None:
    head = {"RAY_CLOUD_INSTANCE_ID": "head", "RAY_NODE_TYPE_NAME": "headgroup"}
    settings = {"num_cpus": 0, "include_dashboard": False, "env_vars": head}
    cluster = Cluster(True, head_node_args=settings | {"_system_config": {"enable_autoscaler_v2": True}})
    kubernetes = FakeKubernetes(resource_of(overlay), cluster)
    cloud_provider.KubernetesHttpApiClient = lambda namespace: kubernetes
    reader = KubeRayConfigReader(lambda: _derive_autoscaling_config_from_ray_cr(kubernetes.get("rayclusters/")))
    events = Path(tempfile.mkdtemp())
    monitor = AutoscalerMonitor(address=cluster.address, config_reader=reader, log_dir=str(events))
    threading.Thread(target=monitor.run, daemon=True).start()
    ray.init(address=cluster.address, log_to_driver=False)
    size = {g["groupName"]: g for g in kubernetes.resource["spec"]["workerGroupSpecs"]}

    def until(done: Callable[[], bool], timeout_s: float = 120.0) -> None:
        deadline = time.monotonic() + timeout_s
        while not done():
            if time.monotonic() > deadline:
                raise TimeoutError(f"pods are {pools()}")
            kubernetes.reconcile()
            time.sleep(0.2)

    resting = {name: group["minReplicas"] for name, group in size.items() if group["minReplicas"]}
    until(lambda: pools() == resting)
    print(json.dumps({"load": "none", "pools": pools()}), flush=True)
    for pool in ("reward-sam", "reward-vlm"):
        gpus = int(size[pool]["template"]["spec"]["containers"][0]["resources"]["limits"].get("nvidia.com/gpu", 0))
        asked = {"num_gpus": gpus, "num_cpus": 0} if gpus else {"num_cpus": 1}
        count = size[pool]["maxReplicas"] if gpus else 1
        replicas = [Replica.options(label_selector={"rl.io/pool": pool}, **asked).remote() for _ in range(count)]
        waiting = [replica.ready.remote() for replica in replicas]
        until(lambda waiting=waiting: not ray.wait(waiting, num_returns=len(waiting), timeout=0)[1])
        print(json.dumps({"load": pool, "pools": pools()}), flush=True)
        del replicas, waiting
        until(lambda: pools() == resting)
        print(json.dumps({"load": "none", "pools": pools()}), flush=True)
    lost = Replica.options(label_selector={"rl.io/pool": "nowhere"}, num_cpus=1).remote()
    waiting = lost.ready.remote()
    until(lambda: bool(_infeasible(events)))
    print(json.dumps({"infeasible": _infeasible(events), "pools": pools()}), flush=True)
    del waiting
    ray.shutdown()
    cluster.shutdown()
    os._exit(0)  # the autoscaler's thread never ends by itself


def _infeasible(events: Path) -> str:
    """What the autoscaler has written of requests that no group can fulfil; empty if nothing."""
    lines = [line for file in events.rglob("*.log") for line in file.read_text().splitlines()]
    return next((json.loads(line)["message"] for line in lines if "can fulfill" in line), "")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
