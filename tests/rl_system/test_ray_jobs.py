"""``ray job submit`` against a cluster that ``ray start`` has made, with a token: refused, stopped, resumed, done."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml
from ray._private.ray_constants import RAY_RUNTIME_ENV_DEFAULT_EXCLUDES
from ray._private.runtime_env.packaging import create_package

from rl_system.commands.attempts import existing_run
from rl_system.config.compose import CONFIG_DIR
from tests.ray_nodes import BIN, HeadNode, head_node, wait_for

ROOT = CONFIG_DIR.parent
RUNTIME_ENV = ROOT / "k8s/runtime-env.yaml"
STEPS, GROUPS = 8, 2


@pytest.mark.unit
def test_the_upload_is_small_and_complete(tmp_path):
    package = tmp_path / "package.zip"
    excludes = RAY_RUNTIME_ENV_DEFAULT_EXCLUDES.split(",")
    create_package(str(ROOT), package, True, excludes=excludes, logger=logging.getLogger(__name__))
    assert package.stat().st_size < 20e6  # most of it are the toy's weights
    names = {name.split("/")[0] for name in zipfile.ZipFile(package).namelist() if "/" in name}
    code = {"actors", "configs", "learners", "reward_servers", "rl_system", "toy", "vlcot"}
    assert code <= names and names.isdisjoint({"runs", "tests", "docs", "benchmarks", ".git", ".venv", "k8s"})


@pytest.mark.unit
def test_the_shipped_runtime_environment_is_that_of_the_rayjob():
    job = yaml.safe_load((ROOT / "k8s/components/train/rayjob.yaml").read_text())
    shipped = yaml.safe_load(RUNTIME_ENV.read_text())
    assert yaml.safe_load(job["spec"]["runtimeEnvYAML"]) == shipped
    assert float(shipped["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"]) >= 60


@pytest.mark.unit
def test_a_run_inside_of_the_upload_is_refused(tmp_path, monkeypatch):
    inside = tmp_path / "working_dir_files/_ray_pkg_1"
    inside.mkdir(parents=True)
    monkeypatch.chdir(inside)
    settings = SimpleNamespace(name="job", overwrite=False, resume="auto", output_dir="runs")
    with pytest.raises(ValueError, match="output_dir=runs lies in the uploaded working directory"):
        existing_run(settings, "seed: 0\n")
    settings.output_dir = str(tmp_path / "runs")
    assert existing_run(settings, "seed: 0\n") is None


def ready_to_stop(head: HeadNode, name: str, cwd: Path) -> subprocess.Popen[str]:
    """`ray job stop`, once a line comes."""
    environment = head.environment | {"RAY_API_SERVER_ADDRESS": head.url}
    command = [sys.executable, "-c", STOP, "job", "stop", name]
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command, env=environment, cwd=cwd, stdin=pipe, stdout=pipe, stderr=subprocess.STDOUT, text=True
    )


def job(head: HeadNode, *arguments: str, cwd: Path, **changed: str) -> subprocess.CompletedProcess[str]:
    environment = head.environment | {"RAY_API_SERVER_ADDRESS": head.url} | changed
    command = [str(BIN / "ray"), "job", *arguments]
    return subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True, timeout=300)


STOP = "import sys; from ray.scripts.scripts import cli; sys.stdin.readline(); cli(sys.argv[1:])"
"""The command line `ray`, which imports for seconds, ready to act at once: the steps of the toy are as short."""


@pytest.fixture
def head(tmp_path):
    with head_node(tmp_path) as node:
        yield node


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.mark.engine
@pytest.mark.timeout(900)
def test_a_job_is_refused_stopped_resumed_and_done_on_a_cluster_with_a_token(head, tmp_path):
    run = tmp_path / "runs/job"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()

    def submit(name: str, *settings: str, wait: bool = True, **changed: str) -> subprocess.CompletedProcess[str]:
        submission = ["submit", "--submission-id", name, "--metadata-json", '{"who": "test"}']
        code = ["--working-dir", str(ROOT), "--runtime-env", str(RUNTIME_ENV)]
        command = ["python", "-m", "rl_system", "train", "experiment=toy", "cluster=job", "resume=auto", "name=job"]
        size = [f"learner.steps={STEPS}", f"learner.groups_per_step={GROUPS}", "learner.warmup_steps=0"]
        size += ["evaluation.prompts=2", f"output_dir={run.parent}"]
        return job(
            head,
            *submission,
            *code,
            *([] if wait else ["--no-wait"]),
            "--",
            *command,
            *size,
            *settings,
            cwd=elsewhere,
            **changed,
        )

    without_token = submit("stranger", wait=False, RAY_AUTH_MODE="disabled", RAY_AUTH_TOKEN="")
    assert without_token.returncode != 0 and "oken" in without_token.stdout + without_token.stderr

    refused = submit("refused", "rollout.gruop_size=8")
    assert "did you mean 'rollout.group_size'?" in refused.stdout, refused.stdout + refused.stderr
    assert refused.returncode == 1  # of the command line, whatever the program's own code
    assert head.ask("/api/jobs/refused")["driver_exit_code"] == 2
    assert not run.exists()

    first = submit("first", wait=False)
    assert first.returncode == 0, first.stdout + first.stderr
    wait_for(run.exists, head.process, 400)
    stop = ready_to_stop(head, "first", elsewhere)
    wait_for(lambda: lines(run / "metrics.jsonl"), head.process, 400)
    said, _ = stop.communicate("now\n", timeout=180)
    assert stop.returncode == 0 and "stopped" in said, said
    assert head.ask("/api/jobs/first")["status"] == "STOPPED"
    assert json.loads((run / "status.json").read_text())["state"] == "stopped"
    done = [record["step"] for record in lines(run / "metrics.jsonl")]
    assert done == list(range(1, len(done) + 1)) and 0 < len(done) < STEPS

    again = submit("second")
    assert again.returncode == 0, again.stdout[-4000:] + again.stderr[-2000:]
    assert f"step {len(done) + 1}/{STEPS}" in again.stdout and f"step {len(done)}/{STEPS}" not in again.stdout
    assert f"report: {run}/report.html" in again.stdout and (run / "report.html").stat().st_size > 10_000
    assert json.loads((run / "status.json").read_text())["state"] == "done"
    assert [record["step"] for record in lines(run / "metrics.jsonl")] == list(range(1, STEPS + 1))
    rows = [row for record in lines(run / "journal.jsonl") for row in record["rows"].values()]
    order = np.random.default_rng([0, 0]).permutation(4096)
    assert rows == [f"epoch-0/train/{index:06d}" for index in order[: STEPS * GROUPS]]
    attempts = lines(run / "attempts.jsonl")
    assert [attempt["submission_id"] for attempt in attempts] == ["first", "second"]
    assert all(attempt["metadata"] == {"who": "test"} for attempt in attempts)
    assert not list(elsewhere.iterdir())
