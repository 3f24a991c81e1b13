"""Rules for pods and for what they refer to: rights, images, claims, secrets, selectors, ways to end."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rl_system.k8s.manifests import Manifest, Pod, Problem, pods, settings

PART_OF = "app.kubernetes.io/part-of"
COMPONENT = "app.kubernetes.io/component"
LEARNER_GRACE_S = 120
DRAIN = ["python", "-m", "rl_system.k8s.drain"]
API = {
    "Namespace": "v1",
    "ConfigMap": "v1",
    "Service": "v1",
    "PersistentVolumeClaim": "v1",
    "StatefulSet": "apps/v1",
    "Job": "batch/v1",
    "PodDisruptionBudget": "policy/v1",
    "NetworkPolicy": "networking.k8s.io/v1",
    "PodMonitor": "monitoring.coreos.com/v1",
    "PrometheusRule": "monitoring.coreos.com/v1",
    "RayJob": "ray.io/v1",
    "RayCluster": "ray.io/v1",
    "RayService": "ray.io/v1",
}
KNOWN_COMPONENTS = frozenset(
    ("head", "learner", "rollout", "reward-sam", "reward-vlm", "submitter", "prefetch", "redis")
)


def problems(manifests: list[Manifest]) -> Iterator[Problem]:
    """Pods with too many rights, references to nothing, selectors that select nothing."""
    for manifest in manifests:
        expected = API.get(manifest.kind)
        if expected is None:
            yield manifest.problem("kind", "unknown here", f"known kinds: {', '.join(API)}")
        elif manifest.doc.get("apiVersion") != expected:
            yield manifest.problem(
                "apiVersion", f"{manifest.doc.get('apiVersion')} has no such kind", f"set {expected}"
            )
        yield from _selectors(manifest)
    yield from _secrets(manifests)
    for pod in pods(manifests):
        yield from _rights(pod)
        yield from _references(pod, manifests)
        if pod.group is not None:
            yield from _ray_pod(pod)
    yield from _whole(manifests)


def _whole(manifests: list[Manifest]) -> Iterator[Problem]:
    if settings(manifests) is None:
        yield Problem("settings.yaml", "ConfigMap settings", "is not in the overlay", "name it under resources")
        return
    denies = {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    policies = [m for m in manifests if m.kind == "NetworkPolicy"]
    if not any((m.doc.get("spec") or {}) == denies for m in policies):
        file = policies[0].file if policies else "k8s/base/network.yaml"
        fix = "keep the policy deny-by-default with an empty podSelector, Ingress and Egress"
        yield Problem(file, "NetworkPolicy deny-by-default", "nothing is denied by default", fix)
    for claim in (m for m in manifests if m.kind == "PersistentVolumeClaim"):
        if claim.doc["spec"].get("accessModes") != ["ReadWriteMany"]:
            yield claim.problem("spec.accessModes", "pods on several nodes mount it", "set [ReadWriteMany]")


def _rights(pod: Pod) -> Iterator[Problem]:
    context = pod.spec.get("securityContext") or {}
    at, problem = f"{pod.path}.spec", pod.manifest.problem
    if context.get("runAsNonRoot") is not True or context.get("runAsUser") in (None, 0):
        fix = "set runAsNonRoot: true and a runAsUser other than 0"
        yield problem(f"{at}.securityContext", "the pod may run as root", fix)
    if (context.get("seccompProfile") or {}).get("type") != "RuntimeDefault":
        yield problem(f"{at}.securityContext.seccompProfile", "no seccomp profile", "set {type: RuntimeDefault}")
    for kind in ("initContainers", "containers"):
        for index, container in enumerate(pod.spec.get(kind) or []):
            yield from _container(pod, f"{at}.{kind}[{index}]", container)


def _container(pod: Pod, at: str, container: dict[str, Any]) -> Iterator[Problem]:
    problem = pod.manifest.problem
    context = container.get("securityContext") or {}
    drops = (context.get("capabilities") or {}).get("drop")
    if context.get("allowPrivilegeEscalation") is not False or drops != ["ALL"]:
        fix = "set allowPrivilegeEscalation: false and capabilities: {drop: [ALL]}"
        yield problem(f"{at}.securityContext", "the container keeps rights", fix)
    image = str(container.get("image", ""))
    tag = image.rsplit("/", 1)[-1].partition(":")[2]
    if "@sha256:" not in image and tag in ("", "latest"):
        fix = "give a tag other than latest, or a digest, as `image` in settings.yaml"
        yield problem(f"{at}.image", f"{image!r} is not pinned", fix)
    limits = (container.get("resources") or {}).get("limits") or {}
    for name in ("cpu", "memory"):
        if name not in limits:
            yield problem(f"{at}.resources.limits", f"no {name}", "Ray and the scheduler need it: add a limit")
    for variable in container.get("env") or []:
        secret = any(word in variable.get("name", "") for word in ("TOKEN", "PASSWORD", "API_KEY", "SECRET"))
        if secret and "value" in variable:
            yield problem(f"{at}.env", f"{variable['name']} is written out", "use valueFrom.secretKeyRef")


def _references(pod: Pod, manifests: list[Manifest]) -> Iterator[Problem]:
    names = {kind: {m.name for m in manifests if m.kind == kind} for kind in ("ConfigMap", "PersistentVolumeClaim")}
    for path, key, value in _walk(pod.spec, f"{pod.path}.spec"):
        for field, name, kind in (
            ("configMapRef", "name", "ConfigMap"),
            ("configMapKeyRef", "name", "ConfigMap"),
            ("persistentVolumeClaim", "claimName", "PersistentVolumeClaim"),
        ):
            if key == field and value.get(name) not in names[kind]:
                fix = f"there are {', '.join(sorted(names[kind]))}"
                yield pod.manifest.problem(f"{path}.{key}", f"{kind} {value.get(name)} does not exist", fix)
    volumes = {volume.get("name") for volume in pod.spec.get("volumes") or []}
    volumes |= {c["metadata"]["name"] for c in pod.manifest.doc["spec"].get("volumeClaimTemplates") or []}
    for container in (*(pod.spec.get("initContainers") or []), *(pod.spec.get("containers") or [])):
        for mount in container.get("volumeMounts") or []:
            if mount.get("name") not in volumes:
                at = f"{pod.path}.spec.containers[{container.get('name')}].volumeMounts"
                yield pod.manifest.problem(at, f"no volume {mount.get('name')}", f"there are {sorted(volumes)}")


def _secrets(manifests: list[Manifest]) -> Iterator[Problem]:
    found = settings(manifests)
    declared = set(str(found.doc["data"].get("secrets", "")).split()) if found else set()
    for manifest in manifests:
        if manifest.kind == "Secret":
            yield manifest.problem("data", "a secret inside the manifests", "create it by hand and only refer to it")
        for path, key, value in _walk(manifest.doc.get("spec") or {}, "spec"):
            if key in ("secretKeyRef", "secretRef") and not value.get("optional") and value.get("name") not in declared:
                fix = "create it and add its name to `secrets` in settings.yaml, or mark it optional"
                yield manifest.problem(f"{path}.{key}", f"Secret {value.get('name')} is not declared", fix)


def _walk(value: Any, path: str) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Every mapping under a key: path of its parent, key, mapping."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if isinstance(inner, dict):
                yield path, key, inner
            yield from _walk(inner, f"{path}.{key}")
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _walk(inner, f"{path}[{index}]")


def _ray_pod(pod: Pod) -> Iterator[Problem]:
    problem = pod.manifest.problem
    wanted = {PART_OF: "rl-system", COMPONENT: pod.group}
    for key, value in wanted.items():
        if pod.labels.get(key) != value:
            fix = f"set {key}: {value}; budgets and network policies select by it"
            yield problem(f"{pod.path}.metadata.labels", f"{key} is {pod.labels.get(key)!r}", fix)
    if pod.group == "head":
        return
    if pod.spec.get("automountServiceAccountToken") is not False:
        fix = "set automountServiceAccountToken: false; only the head's autoscaler needs it"
        yield problem(f"{pod.path}.spec", "a worker gets a token of the API server", fix)
    containers = pod.spec.get("containers") or [{}]
    hook = (containers[0].get("lifecycle") or {}).get("preStop") or {}
    command = (hook.get("exec") or {}).get("command") or []
    grace = pod.spec.get("terminationGracePeriodSeconds", 30)
    at = f"{pod.path}.spec.containers[0].lifecycle.preStop"
    if command[:3] != DRAIN or len(command) != 4:
        yield problem(at, "a stopping pod is not drained", f"exec {' '.join(DRAIN)} SECONDS")
    elif int(command[3]) >= grace:
        fix = "raise terminationGracePeriodSeconds above it"
        yield problem(at, f"drains for {command[3]} s, but the pod is killed after {grace} s", fix)
    if pod.group == "learner" and grace < LEARNER_GRACE_S:
        fix = f"set at least {LEARNER_GRACE_S}: a checkpoint must fit into it"
        yield problem(f"{pod.path}.spec.terminationGracePeriodSeconds", f"{grace} s for a learner", fix)


def _selectors(manifest: Manifest) -> Iterator[Problem]:
    if manifest.kind not in ("NetworkPolicy", "PodDisruptionBudget", "Service"):
        return
    for path, key, value in _walk(manifest.doc.get("spec") or {}, "spec"):
        labels = value if key == "selector" and manifest.kind == "Service" else value.get("matchLabels")
        if key in ("podSelector", "selector", "matchLabels") and isinstance(labels, dict):
            at = f"{path}.{key}"
            for label, allowed in ((PART_OF, {"rl-system"}), (COMPONENT, KNOWN_COMPONENTS)):
                if label in labels and labels[label] not in allowed:
                    fix = f"use one of {', '.join(sorted(allowed))}"
                    yield manifest.problem(at, f"no pod has {label}: {labels[label]}", fix)
