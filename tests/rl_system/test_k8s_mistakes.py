"""Planted mistakes: each is found, with a message that names file, path and fix."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from rl_system.commands.main import main
from rl_system.config.compose import CONFIG_DIR
from rl_system.k8s.manifests import render
from rl_system.k8s.schemas import Schemas

pytestmark = [
    pytest.mark.engine,  # each of them runs kubectl
    pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl renders the overlays"),
]

K8S = CONFIG_DIR.parent / "k8s"
CRDS = Path(os.environ.get("KUBERAY_CRDS", "/work/shared/data/kuberay-crds"))
JOB = "components/train/rayjob.yaml"
CLUSTER = "components/interactive/raycluster.yaml"
SERVICE = "components/reward-service/rayservice.yaml"
MERGE = """patches:
- patch: |
    apiVersion: ray.io/v1
    kind: RayJob
    metadata: {name: train}
    spec: {rayClusterSpec: {workerGroupSpecs: [{groupName: learner, maxReplicas: 2}]}}
"""
PORT = "{containerPort: 1}"
BOX = "{requests: {cpu: 1, memory: 1Gi}, limits: {cpu: 1, memory: 1Gi, nvidia.com/gpu: 0}}"
GROUPS = "spec.rayClusterSpec.workerGroupSpecs"


@dataclass(frozen=True)
class Mistake:
    """``old`` becomes ``new`` in ``file``; the message names ``named`` (default: ``file``), ``path`` and ``fix``."""

    overlay: str
    file: str
    old: str
    new: str
    path: str
    fix: str
    named: str = ""


def sizes(overlay: str, old: str, new: str, path: str, fix: str, named: str = "") -> Mistake:
    return Mistake(overlay, f"overlays/{overlay}/settings.yaml", old, new, path, fix, named)


MISTAKES = {
    "wrong label": Mistake(
        "dev-cpu", JOB, "rl.io/pool: reward-sam", "rl.io/pool: sam", f"{GROUPS}[2].labels", "{rl.io/pool: "
    ),
    "renamed group": Mistake(
        "gpu-8", CLUSTER, "groupName: rollout", "groupName: rollouts", "spec.workerGroupSpecs", "the groups are"
    ),
    "dropped group": Mistake(
        "dev-cpu", JOB, "groupName: rollout", "groupName: spare", "groupName=rollout", "correct", "kustomization.yaml"
    ),
    "strategic merge on the groups": Mistake(
        "dev-cpu", "overlays/dev-cpu/kustomization.yaml", "components:", f"{MERGE}components:", GROUPS, "drops", JOB
    ),
    "no settings component": Mistake(
        "dev-cpu", "overlays/dev-cpu/kustomization.yaml", "- ../../components/settings\n", "", "image", "`image`", JOB
    ),
    "integer num-cpus": Mistake(
        "dev-cpu", JOB, 'num-cpus: "0"', "num-cpus: 0", "rayStartParams.num-cpus", 'quotes: "0"'
    ),
    "work on the head": Mistake(
        "dev-cpu", JOB, 'num-cpus: "0"', 'num-cpus: "4"', "headGroupSpec.rayStartParams", 'num-cpus: "0"'
    ),
    "other Ray": Mistake("dev-cpu", JOB, "rayVersion: 2.60.0", "rayVersion: 2.59.0", "rayVersion", "set 2.60.0"),
    "autoscaler v1": Mistake("dev-cpu", JOB, "version: v2", "version: v1", "autoscalerOptions", "version: v2"),
    "no token": Mistake("dev-cpu", JOB, "{mode: token}", "{mode: disabled}", "authOptions", "mode: token"),
    "labels as start parameter": Mistake(
        "dev-cpu", JOB, "  rayStartParams: {}", "  rayStartParams: {labels: a=b}", "rayStartParams.labels", "own labels"
    ),
    "containers in the wrong order": Mistake(
        "dev-cpu",
        JOB,
        "- name: ray-worker",
        f"- {{name: sidecar, image: 'a:1', resources: {BOX}}}\n          - name: ray-worker",
        "containers[0]",
        "ray-worker first",
    ),
    "restarting pods": Mistake(
        "gpu-8",
        CLUSTER,
        "      automountServiceAccountToken: false",
        "      automountServiceAccountToken: false\n        restartPolicy: Always",
        "restartPolicy",
        "set Never",
    ),
    "retries": sizes("dev-cpu", " resume=auto", "", "spec.backoffLimit", "add resume=auto", named=JOB),
    "ttl of a cluster that stays": Mistake(
        "dev-cpu",
        JOB,
        "shutdownAfterJobFinishes: true",
        "shutdownAfterJobFinishes: false",
        "ttlSeconds",
        "set shutdown",
    ),
    "long name": Mistake("dev-cpu", JOB, "name: train", f"name: {'t' * 48}", "metadata.name", "at most 47"),
    "upper case name": Mistake("gpu-8", CLUSTER, "name: interactive", "name: Mine", "metadata.name", "lower-case"),
    "alpha field": Mistake(
        "dev-cpu", JOB, "rayVersion:", "networkPolicy: {mode: DenyAll}\n    rayVersion:", "networkPolicy", "remove"
    ),
    "service without Redis": Mistake(
        "prod",
        SERVICE,
        "gcsFaultToleranceOptions:",
        "headServiceAnnotations: {}\n    x:",
        "spec.rayClusterConfig.gcsFault",
        "set redisAddress",
    ),
    "Redis elsewhere": Mistake(
        "prod", SERVICE, "rewards-redis:6379", "redis:6379", "redisAddress", "there are rewards-redis"
    ),
    "root": Mistake("dev-cpu", JOB, "runAsNonRoot: true", "runAsNonRoot: false", "securityContext", "runAsNonRoot"),
    "kept capabilities": Mistake(
        "prod", "components/reward-service/redis.yaml", "drop: [ALL]", "drop: [NET_RAW]", "containers[0]", "drop: [ALL]"
    ),
    "token for a worker": Mistake(
        "gpu-8",
        CLUSTER,
        "automountServiceAccountToken: false",
        "automountServiceAccountToken: true",
        "spec.workerGroupSpecs[0].template.spec",
        "set automountServiceAccountToken: false",
    ),
    "no drain": Mistake(
        "dev-cpu", JOB, "python, -m, rl_system.k8s.drain,", "sleep,", "lifecycle.preStop", "rl_system.k8s.drain SECONDS"
    ),
    "killed while draining": Mistake(
        "dev-cpu", JOB, "PeriodSeconds: 180", "PeriodSeconds: 130", "lifecycle.preStop", "terminationGracePeriodSeconds"
    ),
    "pod label": Mistake(
        "dev-cpu",
        JOB,
        "component: learner}",
        "component: trainer}",
        f"{GROUPS}[0].template.metadata",
        "component: learner",
    ),
    "missing ConfigMap": Mistake(
        "dev-cpu", JOB, "configMapRef: {name: environment}", "configMapRef: {name: env}", "configMapRef", "environment"
    ),
    "missing claim": Mistake("dev-cpu", JOB, "claimName: runs", "claimName: run", "persistentVolumeClaim", "runs"),
    "missing volume": Mistake("dev-cpu", JOB, "- name: models\n", "- name: weights\n", "volumeMounts", "weights"),
    "claim of one node": Mistake(
        "dev-cpu", "base/storage.yaml", "ReadWriteMany", "ReadWriteOnce", "spec.accessModes", "set [ReadWriteMany]"
    ),
    "open network": Mistake(
        "dev-cpu",
        "base/network.yaml",
        "policyTypes: [Ingress, Egress]\n---",
        "policyTypes: [Ingress]\n---",
        "NetworkPolicy deny-by-default",
        "keep the policy deny-by-default",
    ),
    "selector of nothing": Mistake(
        "dev-cpu", "base/disruption.yaml", "component: learner", "component: lerner", "selector", "learner"
    ),
    "wrong API version": Mistake(
        "dev-cpu",
        "base/disruption.yaml",
        "apiVersion: policy/v1",
        "apiVersion: policy/v1beta1",
        "apiVersion",
        "policy/v1",
    ),
    "written password": Mistake(
        "prod",
        "components/reward-service/redis.yaml",
        "valueFrom: {secretKeyRef: {name: rewards-redis, key: password}}",
        "value: hunter2",
        "containers[0].env",
        "secretKeyRef",
    ),
    "undeclared secret": sizes(
        "prod", '"rewards-redis reward-token"', '"reward-token"', "secretKeyRef", "`secrets`", SERVICE
    ),
    "latest image": sizes("dev-cpu", ":0.1.0", ":latest", "containers[0].image", "a tag other than latest", JOB),
    "min above max": sizes("dev-cpu", 'rollout-min: "1"', 'rollout-min: "5"', "minReplicas", "rollout-max", JOB),
    "shell in the entrypoint": sizes(
        "dev-cpu", "output_dir=/runs", "output_dir=/runs; true", "spec.entrypoint", "simple", JOB
    ),
    "unknown key of the run": sizes(
        "dev-cpu",
        "cluster=kubernetes output",
        "cluster=kubernetes rollout.actor=2 output",
        "rollout.actors",
        "correct",
        JOB,
    ),
    "Ray of its own": sizes(
        "dev-cpu", "cluster=kubernetes output", "output", "entrypoint", "add cluster=kubernetes", JOB
    ),
    "no node label": sizes(
        "dev-cpu", "cluster=kubernetes output", "cluster=job output", "learner rank asks for no", "binds it to learner"
    ),
    "label of another pool": sizes(
        "gpu-8",
        "policy.path=",
        "rollout.labels={rl.io/pool:learner} policy.path=",
        "learner has",
        "rollout alone",
    ),
    "label of no pool": sizes(
        "dev-cpu",
        "cluster=kubernetes output",
        "cluster=kubernetes +learner.labels={a:b} output",
        "no group has",
        "alone",
    ),
    "server without a label": sizes(
        "prod",
        "          label_selector:\n            rl.io/pool: reward-vlm\n",
        "",
        "qwen_vl replica asks for no node label",
        "binds it to reward-vlm",
    ),
    "more replicas than the pool of a run has pods": sizes(
        "gpu-8", "sam.autoscaling.max_replicas=2", "sam.autoscaling.max_replicas=3", "2 of 3 grounded_sam", "sam-max"
    ),
    "lost run": sizes("dev-cpu", "output_dir=/runs", "output_dir=/tmp", "entrypoint", "output_dir=/runs", JOB),
    "model on no volume": sizes("gpu-8", "/models/policy", "/data/policy", "policy.path", "under /runs or", CLUSTER),
    "images on no volume": sizes("gpu-8", "/models/train", "/data/train", "data.path", "under /runs or", CLUSTER),
    "too few GPUs": sizes(
        "gpu-8", 'learner-gpus: "4"', 'learner-gpus: "2"', "room for 2 of 4 learner ranks", "learner-gpus"
    ),
    "no GPUs": sizes("gpu-8", 'rollout-gpus: "1"', 'rollout-gpus: "0"', "its pods have 0 GPU", "raise rollout-gpus"),
    "pool at zero": sizes("gpu-8", 'reward-vlm-min: "1"', 'reward-vlm-min: "0"', "0 of 1 qwen_vl", "reward-vlm-min"),
    "more replicas than pods": sizes(
        "prod", "max_replicas: 4", "max_replicas: 9", "4 of 9 grounded_sam", "reward-sam-max"
    ),
    "misspelt field of Serve": sizes(
        "prod", "max_queued_requests", "max_queue", "unknown field max_queue", "correct", SERVICE
    ),
    "import of nothing": sizes("prod", ":grounded_sam", ":sam", "reward_apps:sam does not exist", "correct", SERVICE),
    "missing setting": sizes(
        "dev-cpu", "reward-sam-max", "reward-sam-maks", "reward-sam-max", "correct", "kustomization.yaml"
    ),
}

AGAINST_CRDS = {
    "misspelt field": Mistake("dev-cpu", JOB, "backoffLimit", "backofLimit", "spec", "did you mean backoffLimit?"),
    "misspelt in a pod": Mistake(
        "dev-cpu", JOB, "tolerations: &", "toleration: &", f"{GROUPS}[0].template.spec", "did you mean tolerations?"
    ),
    "misspelt in a Job": Mistake(
        "gpu-8", "components/prefetch/job.yaml", "restartPolicy", "restartPolcy", "spec", "did you mean restartPolicy?"
    ),
    "bad quantity": sizes("gpu-8", "48Gi", "48GiB", "limits.memory", "allowed", CLUSTER),
    "number for text": Mistake("dev-cpu", JOB, 'num-cpus: "0"', "num-cpus: 0", "num-cpus", 'quotes: "0"'),
    "claim without a name": Mistake("dev-cpu", JOB, "claimName: runs", "readOnly: true", "Claim", "add the field"),
    "unknown mode": Mistake("dev-cpu", JOB, "mode: token", "mode: tokens", "authOptions.mode", "allowed"),
    "port twice": Mistake(
        "dev-cpu",
        JOB,
        "- name: ray-head",
        f"- name: ray-head\n            ports: [{PORT}, {PORT}]",
        "ports[1]",
        "rename",
    ),
}


def planted(mistake: Mistake, tmp_path: Path) -> Path:
    """The overlay in a copy of ``k8s/`` with the mistake in it."""
    root = tmp_path / "k8s"
    shutil.copytree(K8S, root)
    file = root / mistake.file
    text = file.read_text()
    assert mistake.old in text
    file.write_text(text.replace(mistake.old, mistake.new))
    return root / "overlays" / mistake.overlay


def named(mistake: Mistake, lines: list[str]) -> bool:
    file = mistake.named or mistake.file
    return any(file in line and mistake.path in line and mistake.fix in line for line in lines)


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_is_named_with_file_path_and_fix(mistake, tmp_path, capsys):
    assert main(["k8s", "check", str(planted(mistake, tmp_path))]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert named(mistake, lines), lines


@pytest.fixture(scope="module")
def schemas():
    return Schemas(CRDS)


@pytest.mark.skipif(not CRDS.is_dir(), reason="KubeRay's CRDs are not in $KUBERAY_CRDS")
@pytest.mark.parametrize("mistake", AGAINST_CRDS.values(), ids=AGAINST_CRDS.keys())
def test_a_field_that_the_api_server_refuses_is_named(mistake, tmp_path, schemas):
    lines = [str(problem) for problem in schemas.problems(render(planted(mistake, tmp_path)))]
    assert named(mistake, lines), lines
