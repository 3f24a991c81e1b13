"""The manifests render and pass their own check; nothing here touches a cluster."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from rl_system import assembly
from rl_system.commands.main import main
from rl_system.config.compose import CONFIG_DIR, compose_config
from rl_system.k8s import drain
from rl_system.k8s.checks import check
from rl_system.k8s.manifests import clusters, render
from rl_system.k8s.placement import Group, Request, training_requests, unplaced, worker_groups
from rl_system.k8s.schemas import Schemas

needs_kubectl = pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl renders the overlays")
pytestmark = [pytest.mark.engine, needs_kubectl]

K8S = CONFIG_DIR.parent / "k8s"
OVERLAYS = sorted(path.name for path in (K8S / "overlays").iterdir())
CRDS = Path(os.environ.get("KUBERAY_CRDS", "/work/shared/data/kuberay-crds"))


@pytest.fixture(scope="module")
def schemas():
    return Schemas(CRDS) if CRDS.is_dir() else None


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_overlay_is_good(overlay, schemas):
    manifests, problems = check(K8S / "overlays" / overlay, schemas)
    assert problems == []
    assert {"deny-by-default", "ray-pods", "operator"} <= {m.name for m in manifests if m.kind == "NetworkPolicy"}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_workload_is_good_with_every_overlays_settings(overlay, schemas, tmp_path):
    shutil.copytree(K8S, tmp_path / "k8s")
    folder = tmp_path / "k8s/overlays" / overlay
    file = folder / "kustomization.yaml"
    wanted = yaml.safe_load(file.read_text())
    names = ["train", "interactive", "reward-service", "prefetch", "prometheus", "kueue", "rdma", "settings"]
    wanted["components"] = [f"../../components/{name}" for name in names]
    file.write_text(yaml.safe_dump(wanted))
    settings = folder / "settings.yaml"
    settings.write_text(settings.read_text().replace('secrets: ""', 'secrets: "rewards-redis reward-token"'))
    manifests, problems = check(folder, schemas)
    assert problems == []
    job = next(m for m in manifests if m.kind == "RayJob")
    assert job.doc["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "rl-system" and job.doc["spec"]["suspend"]
    cluster = next(m for m in manifests if m.kind == "RayCluster")
    learner = job.doc["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]
    assert learner["securityContext"]["capabilities"].pop("add") == ["IPC_LOCK"]
    assert learner["resources"]["limits"].pop("rdma/hca") == "1"
    assert cluster.doc["spec"] == job.doc["spec"]["rayClusterSpec"]  # but for RDMA


def test_settings_reach_the_pools_one_by_one(tmp_path):
    shutil.copytree(K8S, tmp_path / "k8s")
    file = tmp_path / "k8s/overlays/gpu-8/settings.yaml"
    data = yaml.safe_load(file.read_text())
    data["data"] |= {"reward-sam-min": "0", "reward-sam-max": "7", "reward-sam-idle-seconds": "45", "image": "i:1"}
    file.write_text(yaml.safe_dump(data))
    (cluster,) = clusters(render(file.parent))
    groups = {name: group for name, _, group in cluster.groups()}
    sam, expert = groups["reward-sam"], groups["reward-vlm"]
    assert (sam["minReplicas"], sam["maxReplicas"], sam["idleTimeoutSeconds"]) == (0, 7, 45)
    assert (expert["minReplicas"], expert["maxReplicas"], expert["idleTimeoutSeconds"]) == (1, 2, 300)
    assert {g["template"]["spec"]["containers"][0]["image"] for g in groups.values()} == {"i:1"}


def test_the_autoscaler_reads_what_the_settings_say():
    (cluster,) = clusters(render(K8S / "overlays/gpu-8"))
    groups = {group.name: group for group in worker_groups(cluster, "max")}
    assert groups["learner"].resources["GPU"] == 4 and groups["rollout"].resources["GPU"] == 1
    assert {name: group.labels["rl.io/pool"] for name, group in groups.items()} == {name: name for name in groups}
    assert {name: group.pods for name, group in groups.items()} == {
        "learner": 1,
        "rollout": 2,
        "reward-sam": 2,
        "reward-vlm": 2,
    }


def test_requests_are_those_of_the_configuration():
    overrides = ["experiment=toy", "rollout.actors=3", "rollout.num_gpus=2", "learner.use_gpu=true"]
    wanted = {r.what: r for r in training_requests(compose_config(overrides), "min")}
    assert (wanted["rollout actor"].count, wanted["rollout actor"].resources["GPU"]) == (3, 2)
    assert (wanted["learner rank"].count, wanted["learner rank"].resources) == (2, {"CPU": 1, "GPU": 1.0})
    assert {r.pool for r in wanted.values()} == {"rollout", "learner", "reward-sam", "reward-vlm"}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_no_request_of_a_run_is_forgotten(overlay):
    """What is placed adds up to what `train` itself says that it needs."""
    data = yaml.safe_load((K8S / "overlays" / overlay / "settings.yaml").read_text())["data"]
    config = compose_config(data["entrypoint"].split()[4:])
    total = {n: sum(r.count * r.resources[n] for r in training_requests(config, "min")) for n in ("CPU", "GPU")}
    assert total == assembly.resources_needed(assembly.demands(config))


def test_a_labelled_request_must_name_exactly_its_group():
    manifest = render(K8S / "overlays/dev-cpu")[0]
    groups = [Group(name, 2, {"CPU": 4}, {"rl.io/pool": name}) for name in ("reward-sam", "reward-vlm")]
    request = Request("detector", "reward-sam", 8, {"CPU": 1}, {"rl.io/pool": "reward-sam"})

    def found(wanted, groups=groups):
        return [str(p) for p in unplaced([wanted], groups, manifest, "settings.yaml", "max")]

    assert found(request) == []
    assert "has room for 8 of 9 detectors" in found(replace(request, count=9))[0]
    assert "asks for no node label" in found(replace(request, selector={}))[0]
    assert "no group has them" in found(replace(request, selector={"rl.io/pool": "other"}))[0]
    alike = [replace(group, labels={"rl.io/pool": "reward-sam"}) for group in groups]
    assert "reward-sam, reward-vlm has them" in found(request, alike)[0]


def test_the_kubernetes_choice_binds_every_request_to_its_group():
    for request in training_requests(compose_config(["experiment=toy", "cluster=kubernetes"]), "min"):
        assert request.selector == {"rl.io/pool": request.pool}


def test_what_autoscaling_may_add_counts_at_the_groups_largest_size():
    config = compose_config(["experiment=toy", "reward.qwen_vl.autoscaling={min_replicas: 2, max_replicas: 5}"])
    counts = {bound: {r.what: r.count for r in training_requests(config, bound)} for bound in ("min", "max")}
    assert counts["min"]["qwen_vl replica"] == 2 and counts["max"]["qwen_vl replica"] == 5
    assert counts["min"]["grounded_sam replica"] == counts["max"]["grounded_sam replica"] == 1


def test_serve_applications_can_be_built():
    from rl_system import reward_apps

    for build in (reward_apps.grounded_sam, reward_apps.visual_expert):
        assert build({"overrides": "experiment=toy"}) is not None


def test_drain_finds_the_node_of_its_own_pod():
    def node(state, pod, name):
        return SimpleNamespace(state=state, instance_id=pod, node_id=name)

    nodes = [node(1, "pod-a", b"\x01"), node(0, "pod-b", b"\x02"), node(0, "pod-a", b"\x03")]
    assert drain.own_node(nodes, "pod-a") == "03"
    assert drain.own_node(nodes, "pod-c") is None


def test_the_command_answers_with_one_line_or_with_2(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(K8S.parent)
    assert main(["k8s", "check", "dev-cpu"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("k8s/overlays/dev-cpu: good: ") and out.count("\n") == 1
    assert main(["k8s", "render", "gpu-8"]) == 0
    assert "kind: RayCluster" in capsys.readouterr().out
    for wrong in (["check", "nowhere"], ["render", "nowhere"], ["check", "dev-cpu", "--crds", str(tmp_path)], []):
        assert main(["k8s", *wrong]) == 2
        assert capsys.readouterr().err


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """A kubectl that renders as the real one does and writes down whatever else it is asked for."""
    asked, stand_in = tmp_path / "asked", tmp_path / "bin/kubectl"
    stand_in.parent.mkdir()
    real = shutil.which("kubectl")
    render = f'[ "$1" = kustomize ] && exec {real} "$@"'
    note = f'echo "$@" >> {asked}; [ "$1" = apply ] && cat >> {asked}'
    stand_in.write_text(f"#!/bin/sh\n{render}\n{note}\nexit $KUBECTL_SAYS\n")
    stand_in.chmod(0o755)
    monkeypatch.setenv("PATH", f"{stand_in.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("KUBECTL_SAYS", "0")
    monkeypatch.chdir(K8S.parent)
    return asked


def test_submit_applies_what_it_has_checked(cluster, capsys):
    assert main(["k8s", "submit", "dev-cpu", "--dry-run"]) == 0
    command, _, manifests = cluster.read_text().partition("\n")
    assert command == "apply --dry-run=server --filename -"
    assert {doc["kind"] for doc in yaml.safe_load_all(manifests)} >= {"RayJob", "NetworkPolicy"}
    assert "dev-cpu: good" in capsys.readouterr().out


def test_submit_sends_nothing_that_the_check_refuses(cluster, tmp_path, capsys):
    shutil.copytree(K8S, tmp_path / "k8s")
    overlay = tmp_path / "k8s/overlays/dev-cpu"
    settings = overlay / "settings.yaml"
    settings.write_text(settings.read_text().replace(" resume=auto", ""))
    assert main(["k8s", "submit", str(overlay)]) == 2
    assert "add resume=auto" in capsys.readouterr().err and not cluster.exists()


def test_logs_and_status_ask_kubectl_and_pass_its_failure_on(cluster, monkeypatch):
    assert main(["k8s", "logs"]) == main(["k8s", "logs", "rollout", "--follow"]) == main(["k8s", "status"]) == 0
    first, second, third = cluster.read_text().splitlines()
    assert first.startswith("logs --namespace rl-system --selector app.kubernetes.io/component=submitter")
    assert "component=rollout" in second and second.endswith("--follow")
    assert third.startswith("get rayjob,raycluster,rayservice,pod --namespace rl-system")
    monkeypatch.setenv("KUBECTL_SAYS", "3")
    assert main(["k8s", "status"]) == 1
    assert main(["k8s", "logs", "everything"]) == 2
    monkeypatch.setenv("PATH", "/nowhere")
    assert main(["k8s", "status"]) == 2
