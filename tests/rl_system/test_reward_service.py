"""The RayService's ``serveConfigV2``: what ``serve-rewards`` prints, and servers that a run in another cluster asks."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import urllib.error
from pathlib import Path

import psutil
import pytest
import yaml

from reward_servers.http_guard import TOKEN_VARIABLE
from rl_system.commands.main import main
from rl_system.config.compose import CONFIG_DIR
from rl_system.k8s.manifests import RayClusterSpec, clusters, render
from tests.processes import free_ports
from tests.ray_nodes import HeadNode, head_node, wait_for

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl renders the overlays"),
]

ROOT = CONFIG_DIR.parent
OVERLAYS = sorted(path.name for path in (ROOT / "k8s/overlays").iterdir())
TOKEN = "a-token-of-the-tests-0123456789"
TINY = ["learner.steps=1", "learner.groups_per_step=2", "learner.warmup_steps=0", "evaluation.prompts=2"]
SERVE = "/api/serve/applications/"
"""Where the operator puts the configuration."""
SERVED_BY_SERVE = re.compile(r"ray::(ServeReplica|ServeController|ProxyActor|ServeProxyActor)")


def service(overlay: str, tmp_path: Path) -> RayClusterSpec:
    """The RayService of an overlay, as it renders with the component."""
    shutil.copytree(ROOT / "k8s", tmp_path / "k8s")
    file = tmp_path / "k8s/overlays" / overlay / "kustomization.yaml"
    wanted = yaml.safe_load(file.read_text())
    wanted["components"] = ["../../components/reward-service", "../../components/settings"]
    file.write_text(yaml.safe_dump(wanted))
    (found,) = (cluster for cluster in clusters(render(file.parent)) if cluster.manifest.kind == "RayService")
    return found


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_configuration_of_the_service_is_what_serve_rewards_prints(overlay, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("VLLM_LOGGING_LEVEL", raising=False)  # which tests before this one may have set
    configured = service(overlay, tmp_path).manifest.doc["spec"]["serveConfigV2"]
    (overrides,) = {app["args"]["overrides"] for app in yaml.safe_load(configured)["applications"]}
    assert main(["serve-rewards", "config", *shlex.split(overrides), "--host", "0.0.0.0"]) == 0
    assert capsys.readouterr().out == configured


def pools(cluster: RayClusterSpec) -> list[tuple[int, dict[str, str]]]:
    """CPUs and node labels of a pod of each worker group."""
    groups = [group for name, _, group in cluster.groups() if name != "head"]
    limits = [group["template"]["spec"]["containers"][0]["resources"]["limits"] for group in groups]
    return [(int(limit["cpu"]), group["labels"]) for limit, group in zip(limits, groups, strict=True)]


def deployed(head: HeadNode) -> dict[str, dict]:
    try:
        return head.ask(SERVE)["applications"]
    except urllib.error.HTTPError:  # Serve is just starting
        return {}


def running(head: HeadNode) -> bool:
    states = {name: app["status"] for name, app in deployed(head).items()}
    assert not {"DEPLOY_FAILED", "UNHEALTHY"} & set(states.values()), deployed(head)
    return bool(states) and set(states.values()) == {"RUNNING"}


def pids(head: HeadNode, app: str) -> set[int]:
    """Of the replicas; there may be a second one by now."""
    return {replica["pid"] for replica in deployed(head)[app]["deployments"][app]["replicas"]}


def asked(head: HeadNode, app: str) -> float:
    """Requests that replicas have answered, by Serve's counter at the nodes' Prometheus endpoints."""
    counted = re.compile(
        rf'^ray_serve_deployment_request_counter_total{{.*application="{app}".*}} (\S+)$', re.MULTILINE
    )
    return sum(float(value) for text in head.metrics() for value in counted.findall(text))


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.timeout(900)
def test_a_run_in_another_cluster_has_its_rewards_from_the_service(tmp_path):
    cluster = service("dev-cpu", tmp_path)
    config = yaml.safe_load(cluster.manifest.doc["spec"]["serveConfigV2"])
    (port,) = free_ports(1)
    config["http_options"] = {"host": "127.0.0.1", "port": port}  # all else is as it renders
    first, *others = pools(cluster)
    with head_node(ROOT, *first, PYTHONPATH=str(ROOT), **{TOKEN_VARIABLE: TOKEN}) as head:
        for cpus, labels in others:
            head.join(cpus, labels)
        head.ask(SERVE, put=config)
        wait_for(lambda: running(head), head.process, 300)

        said, of_serve = train(tmp_path, f"http://127.0.0.1:{port}")
        run = tmp_path / "runs/asks"
        summary = json.loads((run / "summary.json").read_text())
        for app in ("grounded_sam", "qwen_vl"):
            assert summary["engines"][app]["pid"] in pids(head, app), said
        assert of_serve == set()
        (step,) = lines(run / "metrics.jsonl")
        assert step["failures/rate"] == 0 and step["reward/generation"] > 0
        scored = [event["name"] for event in lines(run / "timeline.jsonl") if event["process"] == "rewards"]
        images, groups = len(set(scored)) + summary["prompts"], len(scored) + 2 * summary["prompts"]
        wait_for(lambda: asked(head, "grounded_sam") > images, head.process, 60)  # and once whether it is ready
        wait_for(lambda: asked(head, "qwen_vl") > groups, head.process, 60)


def train(tmp_path: Path, url: str) -> tuple[str, set[str]]:
    """A tiny run on a Ray of its own: what it said, and which processes of Serve it had."""
    command = [sys.executable, "-m", "rl_system", "train", "experiment=toy", f"reward.url={url}", "name=asks"]
    process = subprocess.Popen(
        [*command, *TINY, f"output_dir={tmp_path}/runs"],
        cwd=ROOT,
        env=os.environ | {TOKEN_VARIABLE: TOKEN, "RAY_AUTH_MODE": "disabled"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    said, looks, of_serve = [], 0, set()
    for line in process.stdout:
        said.append(line)
        if line.startswith(("evaluating", "step ")):
            names = [" ".join(child.cmdline()) for child in children(process)]
            assert any(name.startswith("ray::") for name in names)
            looks += 1
            of_serve |= {name for name in names if SERVED_BY_SERVE.match(name)}
    output = "".join(said)
    assert process.wait(timeout=120) == 0 and looks, output[-4000:]
    return output, of_serve


def children(process: subprocess.Popen) -> list[psutil.Process]:
    return [p for p in psutil.Process(process.pid).children(recursive=True) if p.status() != psutil.STATUS_ZOMBIE]
