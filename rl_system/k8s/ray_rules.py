"""Rules of the KubeRay operator (v1.7.0) that its CRDs cannot say, and those of this project's worker groups.

The operator's own are in its ``validation.go``; it refuses an object that breaks one after it was applied.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

from rl_system.k8s.manifests import Manifest, Problem, RayClusterSpec, clusters

POOL_LABEL = "rl.io/pool"
REWARD_POOLS = ("reward-sam", "reward-vlm")
POOLS = {
    "RayJob": ("learner", "rollout", *REWARD_POOLS),
    "RayCluster": ("learner", "rollout", *REWARD_POOLS),
    "RayService": REWARD_POOLS,
}
NAME_LIMIT = {"RayCluster": 53, "RayJob": 47, "RayService": 47}
RESOURCE_PARAMS = ("num-cpus", "num-gpus", "memory", "resources")
ALPHA = {
    "networkPolicy": "RayClusterNetworkPolicy",
    "tlsOptions": "RayClusterMTLS",
    "historyServerOptions": "RayClusterHistoryServer",
}
_LABEL = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?")
_DNS = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
_SHELL = set(";&|<>$`\"'\\\n")


def problems(manifests: list[Manifest]) -> Iterator[Problem]:
    """What the operator would refuse, and groups that are not as the system needs them."""
    for manifest in manifests:
        if manifest.kind in NAME_LIMIT:
            yield from _name(manifest)
        if manifest.kind == "RayJob":
            yield from _job(manifest)
        if manifest.kind == "RayService":
            yield from _service(manifest, {m.name for m in manifests if m.kind == "Service"})
    for cluster in clusters(manifests):
        yield from _cluster(cluster)
        yield from _pools(cluster)
        for name, path, group in cluster.groups():
            yield from _group(cluster, name, path, group)
            yield from _autoscaled(cluster, path, group)


def _name(manifest: Manifest) -> Iterator[Problem]:
    limit = NAME_LIMIT[manifest.kind]
    if len(manifest.name) > limit or not _DNS.fullmatch(manifest.name):
        fix = f"at most {limit} lower-case letters, digits and '-', a letter first"
        yield manifest.problem("metadata.name", f"{manifest.name!r} is no name for a {manifest.kind}", fix)


def _cluster(cluster: RayClusterSpec) -> Iterator[Problem]:
    spec, at, problem = cluster.spec, cluster.path, cluster.manifest.problem
    installed = version("ray")
    if spec.get("rayVersion") != installed:
        yield problem(
            f"{at}.rayVersion", f"{spec.get('rayVersion')} is not the Ray of this project", f"set {installed}"
        )
    if not spec.get("enableInTreeAutoscaling") or (spec.get("autoscalerOptions") or {}).get("version") != "v2":
        fix = "set enableInTreeAutoscaling: true and autoscalerOptions.version: v2"
        yield problem(f"{at}.autoscalerOptions", "the pools need autoscaler v2 for an idle time of their own", fix)
    if (spec.get("authOptions") or {}).get("mode") != "token":
        fix = "set authOptions: {mode: token}"
        yield problem(f"{at}.authOptions", "whoever reaches the dashboard could run code", fix)
    for key, gate in ALPHA.items():
        if key in spec:
            yield problem(f"{at}.{key}", f"needs the operator's alpha gate {gate}", "remove it")
    if (fault := spec.get("gcsFaultToleranceOptions")) is None:
        return
    if cluster.manifest.kind == "RayJob":
        yield problem(f"{at}.gcsFaultToleranceOptions", "a job's driver ends with its head anyway", "remove it")
    if fault.get("backend") == "rocksdb":
        gate = "GCSFaultToleranceEmbeddedStorage"
        yield problem(f"{at}.gcsFaultToleranceOptions.backend", f"rocksdb needs the alpha gate {gate}", "use redis")
    for _, path, group in cluster.groups():
        if "redis-password" in (group.get("rayStartParams") or {}):
            fix = "give the password in gcsFaultToleranceOptions.redisPassword only"
            yield problem(f"{path}.rayStartParams", "redis-password beside gcsFaultToleranceOptions", fix)


def _pools(cluster: RayClusterSpec) -> Iterator[Problem]:
    names = [name for name, _, _ in cluster.groups() if name != "head"]
    at = f"{cluster.path}.workerGroupSpecs"
    needed = POOLS[cluster.manifest.kind]
    for name in sorted(set(needed) - set(names)):
        fix = f"the groups are {', '.join(needed)}; a strategic-merge patch on the list drops the others"
        yield cluster.manifest.problem(at, f"worker group {name} is missing", fix)
    for name in sorted(set(names) - set(needed)):
        yield cluster.manifest.problem(at, f"unknown worker group {name}", f"the groups are {', '.join(needed)}")
    for name in sorted({n for n in names if names.count(n) > 1}):
        yield cluster.manifest.problem(at, f"two worker groups are called {name}", "keep one")


def _group(cluster: RayClusterSpec, name: str, path: str, group: dict[str, Any]) -> Iterator[Problem]:
    problem = cluster.manifest.problem
    labels = group.get("labels") or {}
    if labels.get(POOL_LABEL) != name:
        fix = f"set labels: {{{POOL_LABEL}: {name}}}"
        yield problem(f"{path}.labels", f"{POOL_LABEL} is {labels.get(POOL_LABEL)!r} in group {name}", fix)
    for key, value in labels.items():
        if not isinstance(value, str) or not _LABEL.fullmatch(value):
            yield problem(f"{path}.labels.{key}", f"{value!r} is no label", "at most 63 letters, digits, - _ .")
    params = group.get("rayStartParams") or {}
    for key, value in params.items():
        if not isinstance(value, str):
            yield problem(f"{path}.rayStartParams.{key}", f"{value!r} is no string", f'write it in quotes: "{value}"')
    if "labels" in params:
        yield problem(f"{path}.rayStartParams.labels", "the operator refuses it", "use the group's own labels")
    both = [key for key in RESOURCE_PARAMS if key in params]
    if group.get("resources") and both:
        fix = "keep the container's limits and remove both"
        yield problem(f"{path}.resources", f"given beside rayStartParams {', '.join(both)}", fix)
    for key in group.get("resources") or {}:
        if key.lower().endswith("gpu") and key != "GPU":
            yield problem(f"{path}.resources.{key}", "KubeRay counts any key ending in gpu as GPUs", "rename it")
    if name == "head":
        if params.get("num-cpus") != "0":
            fix = 'set rayStartParams: {num-cpus: "0"}'
            yield problem(f"{path}.rayStartParams", "work would be placed beside the driver", fix)
    else:
        low, high = group.get("minReplicas"), group.get("maxReplicas")
        if not (isinstance(low, int) and isinstance(high, int) and 0 <= low <= high and high > 0):
            fix = f"0 <= {name}-min <= {name}-max and {name}-max > 0 in settings.yaml"
            yield problem(f"{path}.minReplicas", f"minReplicas {low} and maxReplicas {high} do not go together", fix)
    yield from _ray_container(cluster, name, path, group)


def _ray_container(cluster: RayClusterSpec, name: str, path: str, group: dict[str, Any]) -> Iterator[Problem]:
    containers = ((group.get("template") or {}).get("spec") or {}).get("containers") or []
    expected = "ray-head" if name == "head" else "ray-worker"
    first = containers[0].get("name") if containers else None
    at = f"{path}.template.spec.containers[0]"
    if first != expected:
        fix = f"put the container {expected} first: the operator starts Ray in containers[0]"
        yield cluster.manifest.problem(at, f"is {first}, not the Ray container", fix)


def _autoscaled(cluster: RayClusterSpec, path: str, group: dict[str, Any]) -> Iterator[Problem]:
    problem = cluster.manifest.problem
    pod = (group.get("template") or {}).get("spec") or {}
    if pod.get("restartPolicy", "Never") != "Never":
        fix = "remove it or set Never"
        yield problem(f"{path}.template.spec.restartPolicy", f"{pod['restartPolicy']} with autoscaler v2", fix)
    if (cluster.spec.get("autoscalerOptions") or {}).get("version") != "v2":
        for key in ("idleTimeoutSeconds", "priority"):
            if key in group:
                fix = "set autoscalerOptions.version: v2"
                yield problem(f"{path}.{key}", "only autoscaler v2 has it for a single group", fix)
    taken = {"RAY_enable_autoscaler_v2": "autoscalerOptions.version"}
    if "gcsFaultToleranceOptions" in cluster.spec:
        taken |= dict.fromkeys(("REDIS_PASSWORD", "RAY_REDIS_ADDRESS"), "gcsFaultToleranceOptions")
    for container in pod.get("containers") or []:
        for variable in container.get("env") or []:
            if field := taken.get(variable.get("name")):
                where = f"{path}.template.spec.containers[{container.get('name')}].env"
                yield problem(where, f"{variable['name']} beside {field}", "remove the variable")


def _job(job: Manifest) -> Iterator[Problem]:
    spec = job.doc.get("spec") or {}
    mode, retries = spec.get("submissionMode", "K8sJobMode"), spec.get("backoffLimit", 0)
    ends = bool(spec.get("shutdownAfterJobFinishes"))
    if (spec.get("ttlSecondsAfterFinished") or 0) > 0 and not ends:
        fix = "set shutdownAfterJobFinishes: true"
        yield job.problem("spec.ttlSecondsAfterFinished", "has no meaning for a cluster that stays", fix)
    if (spec.get("deletionStrategy") or {}).get("deletionRules") and ends:
        yield job.problem(
            "spec.deletionStrategy", "deletionRules beside shutdownAfterJobFinishes", "keep one of the two"
        )
    if spec.get("suspend") and not ends:
        yield job.problem("spec.suspend", "needs shutdownAfterJobFinishes: true", "set it")
    if spec.get("clusterSelector"):
        yield job.problem("spec.clusterSelector", "the job brings its own cluster", "remove it, or use the RayCluster")
    if retries and "resume=auto" not in (spec.get("entrypoint") or ""):
        fix = "set 0, or add resume=auto to the entrypoint: `train` refuses a run directory that exists"
        yield job.problem("spec.backoffLimit", f"{retries} retries could only fail", fix)
    if mode == "SidecarMode" and spec.get("submitterPodTemplate"):
        yield job.problem("spec.submitterPodTemplate", "has no meaning in SidecarMode", "remove it or the mode")
    if "upgradeStrategy" in (spec.get("rayClusterSpec") or {}):
        yield job.problem("spec.rayClusterSpec.upgradeStrategy", "the operator refuses it in a RayJob", "remove it")
    if bad := sorted(_SHELL & set(spec.get("entrypoint") or "")):
        fix = "one simple command without them: it is pasted into a shell line"
        yield job.problem("spec.entrypoint", f"contains {' '.join(map(repr, bad))}", fix)
    for key in ("entrypointNumCpus", "entrypointNumGpus"):
        if spec.get(key):
            fix = "remove it: the head has no CPUs to give, so the driver would die with a worker"
            yield job.problem(f"spec.{key}", f"{spec[key]} takes the driver off the head", fix)


def _service(service: Manifest, services: set[str]) -> Iterator[Problem]:
    spec = service.doc.get("spec") or {}
    cluster = spec.get("rayClusterConfig") or {}
    if "upgradeStrategy" in cluster:
        yield service.problem(
            "spec.rayClusterConfig.upgradeStrategy", "the operator refuses it here", "move it to spec"
        )
    redis = (cluster.get("gcsFaultToleranceOptions") or {}).get("redisAddress")
    at = "spec.rayClusterConfig.gcsFaultToleranceOptions"
    if redis is None:
        yield service.problem(at, "a lost head would end the service", "set redisAddress and redisPassword")
    elif redis.partition(":")[0] not in services:
        fix = f"there are {', '.join(sorted(services)) or 'none'}"
        yield service.problem(f"{at}.redisAddress", f"no Service is called {redis.partition(':')[0]}", fix)
