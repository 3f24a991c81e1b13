"""``rl-system train`` as a user meets it: wrong input ends at once, a run ends with a report, Ctrl-C ends it whole."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import psutil
import pytest
import ray
from PIL import Image
from ray._private.services import canonicalize_bootstrap_address

from rl_system.commands.attempts import connect
from rl_system.commands.main import main
from rl_system.config.compose import load_config
from rl_system.runs.directory import RunDirectory
from rl_system.runs.live import read_live
from rl_system.runs.metric_names import GRPO, LIVE, prometheus_name
from tests.processes import alive
from vlcot.sequence import CHAIN_TAGS

ROOT = Path(__file__).resolve().parents[2]
TINY = ["learner.steps=2", "learner.groups_per_step=2", "learner.warmup_steps=0", "evaluation.prompts=3"]


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


def refused(capsys, tmp_path, *overrides: str) -> str:
    """The one-line message of a refused run that left nothing behind."""
    code = main(["train", "experiment=toy", f"output_dir={tmp_path}/runs", *overrides])
    message = capsys.readouterr().err.strip()
    assert code == 2
    assert message.startswith("rl-system train: ")
    assert len(message.splitlines()) == 1
    assert not (tmp_path / "runs").exists()
    return message


@pytest.mark.unit
@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("rollout.gruop_size=8", "did you mean 'rollout.group_size'?"),
        ("learner.ranks=two", "learner.ranks"),
        ("rollout.group_size=1", "rollout.group_size=1 is too small: it must be at least 2"),
        ("rollout.temperature=0", "rollout.temperature=0 must be positive"),
        ("grpo.kl=k4", "grpo.kl=k4 is not known; allowed: k1, k2, k3"),
        ("reward.expert_weights.quality=0.9", "expert weights must be non-negative and sum to 1"),
        ("policy.path=/nowhere", "policy.path=/nowhere: no checkpoint there"),
        ("rollout.max_new_tokens=50", "the images alone take"),
        ("learner.lora.rank=-1", "learner.lora.rank=-1 must be at least 1"),
        ("learner.lora.rank=1000", "learner.lora.rank=1000 is too large for q_proj, a matrix of"),
        ("learner.lora.targets=[q_proj]", "learner.lora.targets=['q_proj'] has no meaning without adapters"),
        ("learner.ranks=64", "the run needs 67 CPU"),
        ("rollout.num_gpus=8", "the run needs 8 GPU"),
        ("data=nothing", "Could not find 'data/nothing'"),
        ("rollout.labels={rl.io/pool: rollout}", "takes a new entry as '+rollout.labels={name: value}'"),
        ("+rollout.labels={rl.io/pool: rollout}", "needs cluster.address=auto"),
        ("+reward.qwen_vl.labels={rl.io/pool/: vlm}", "reward.qwen_vl.labels={rl.io/pool/: vlm} is no node label"),
        ("+learner.labels={rl.io/pool: '!spot'}", "learner.labels={rl.io/pool: !spot} is no node label"),
        ("reward.qwen_vl.autoscaling.max_replicas=0", "max_replicas=0 is below min_replicas=1"),
        ("reward.grounded_sam.autoscaling={max_replicas: 2, min_replicas: 0}", "keeps at least 1 replica"),
        (
            "reward.grounded_sam.autoscaling={max_replicas: 2, target_ongoing_requests: 0}",
            "requests=0 must be positive",
        ),
        (
            "reward.qwen_vl.autoscaling={max_replicas: 2, upscale_delay_s: -1}",
            "upscale_delay_s=-1 must not be negative",
        ),
        (
            "reward.qwen_vl.autoscaling={max_replicas: 90, min_replicas: 80}",
            "autoscaling.min_replicas=80), but there are 16",
        ),
        ("reward.qwen_vl.autoscaling.max_replica=2", "did you mean 'reward.qwen_vl.autoscaling.max_replicas'?"),
    ],
)
def test_a_wrong_setting_is_refused_with_one_clear_message(capsys, tmp_path, override, said):
    assert said in refused(capsys, tmp_path, override)


@pytest.mark.unit
@pytest.mark.parametrize(("reward", "block"), [("degradation", "degradation"), ("understanding", "rough_understand")])
def test_a_reward_on_a_block_that_the_policy_does_not_write_is_refused(capsys, tmp_path, reward, block):
    policy = tmp_path / "policy"
    shutil.copytree(ROOT / "toy/weights/policy", policy)
    config = json.loads((policy / "config.json").read_text())
    config["layout"]["blocks"] = [tag for tag in CHAIN_TAGS if tag != block]
    (policy / "config.json").write_text(json.dumps(config))
    assert f"reward.weights.{reward} must be 0: the policy" in refused(capsys, tmp_path, f"policy.path={policy}")


@pytest.mark.unit
def test_a_missing_folder_and_an_unreadable_image_are_refused_by_name(capsys, tmp_path):
    assert "no such folder" in refused(capsys, tmp_path, "data=folder", f"data.path={tmp_path}/none")
    folder = tmp_path / "photos"
    folder.mkdir()
    assert "no image there" in refused(capsys, tmp_path, "data=folder", f"data.path={folder}")
    Image.new("RGB", (80, 80)).save(folder / "good.png")
    (folder / "broken.png").write_text("no image")
    assert "cannot read the image" in refused(capsys, tmp_path, "data=folder", f"data.path={folder}")
    (folder / "broken.png").unlink()
    Image.new("RGB", (10, 80)).save(folder / "small.png")
    assert "small.png is 10x80" in refused(capsys, tmp_path, "data=folder", f"data.path={folder}")


@pytest.mark.unit
def test_a_local_run_starts_its_own_ray_even_where_a_cluster_can_be_found(monkeypatch):
    asked = {}
    monkeypatch.setattr(ray, "init", lambda **options: asked.update(options))
    monkeypatch.setattr(os, "environ", os.environ | {"RAY_ADDRESS": "127.0.0.1:6379"})
    connect(load_config(["experiment=toy"]).cluster, start_timeout_s=600, run="mine")
    assert canonicalize_bootstrap_address(asked["address"]) is None  # Ray's own reading of it


def start(tmp_path: Path, name: str, *overrides: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "rl_system", "train", "experiment=toy", f"name={name}", f"output_dir={tmp_path}"]
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled", "HF_HUB_OFFLINE": "1"}
    environment["RAY_metrics_report_interval_ms"] = "500"
    return subprocess.Popen(
        [*command, *TINY, *overrides],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # A shell that runs the tests in the background hands down an ignored SIGINT, as no terminal would.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def worker_logs(run: Path) -> list[dict]:
    """What actors and learner ranks of the last attempt have logged."""
    logs = run / "logs" / "ray"
    paths = [*logs.glob("worker-*.err"), *logs.glob("train/ray-train-app-worker-*.log")]
    texts = [path.read_text(errors="replace") for path in paths]
    return [json.loads(line) for text in texts for line in text.splitlines() if line.startswith('{"asctime"')]


def ready_and_waiting(run: Path) -> set[int]:
    """Orders of the groups that have their rewards and that no step was given."""
    given = {int(order) for record in lines(run / "journal.jsonl") for order in record["rows"]}
    return {int(path.stem) for path in (run / "ready").glob("*.group")} - given


def still_alive(processes: list[psutil.Process]) -> list[psutil.Process]:
    """Those that do not end within half a minute."""
    gone, _ = psutil.wait_procs([p for p in processes if p.is_running()], timeout=30)
    return [p for p in processes if p not in gone and alive(p)]


def descendants(process: subprocess.Popen) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def endpoint(run: Path) -> set[str]:
    """Names of our metrics at the run's Prometheus endpoint."""
    with urllib.request.urlopen(lines(run / "attempts.jsonl")[-1]["metrics"], timeout=10) as answer:
        return set(re.findall(r"^(ray_rl_\w+)\{", answer.read().decode(), re.MULTILINE))


@pytest.mark.engine
@pytest.mark.timeout(900)
def test_a_tiny_run_is_stopped_goes_on_and_ends_with_a_report_with_every_part_real(tmp_path, capsys):
    run, settings = tmp_path / "tiny", ["learner.steps=4", "learner.checkpoint_every=1", "resume=auto"]
    settings.append("coordination.max_staleness=2")  # while step 2 is trained the groups of step 3 are ready
    process = start(tmp_path, "tiny", *settings)
    said = []
    for line in process.stdout:
        said.append(line)
        if line.startswith("step 1/4"):
            children = descendants(process)
            while len(lines(run / "journal.jsonl")) < 2 or not ready_and_waiting(run):
                assert process.poll() is None
                time.sleep(0.01)
            process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=120) == 75, "".join(said)[-4000:]
    assert len(children) > 12 and still_alive(children) == []  # Ray, the engines and the learner ranks
    assert json.loads((run / "status.json").read_text())["state"] == "stopped" and not (run / "summary.json").exists()
    stopped = [record["step"] for record in lines(run / "metrics.jsonl")]
    assert stopped in ([1], [1, 2], [1, 2, 3]), "".join(said)
    ready = ready_and_waiting(run)
    assert ready, "".join(said)

    process = start(tmp_path, "tiny", *settings)
    said, seen, asked = [], set(), ""
    for line in process.stdout:
        said.append(line)
        if line.startswith("step "):
            assert main(["status", str(run)]) == 0
            asked = capsys.readouterr().out
        if line.startswith("evaluating after"):  # the endpoint is as old as half a second
            for _ in range(4):
                time.sleep(0.5)
                seen |= endpoint(run)
    output = "".join(said)
    assert process.wait() == 0, output[-4000:]
    assert "evaluating before" not in output
    for shown in ("stage: training", "rollout 0", "learner", "attempt 2", "reward "):
        assert shown in asked
    # Servers are in it once they were asked: after the last step only, where every group was ready before.
    assert {"grounded_sam", "qwen_vl"} <= {process.name for process in read_live(RunDirectory.open(run)).processes}
    rows = [row for record in lines(run / "journal.jsonl") for row in record["rows"].values()]
    order = np.random.default_rng([0, 0]).permutation(4096)
    assert rows == [f"epoch-0/train/{index:06d}" for index in order[:8]]
    summary = json.loads((run / "summary.json").read_text())
    assert summary["steps"] == 4
    assert summary["groups_trained"] == 8
    assert summary["groups_reused"] == len(ready) and not list((run / "ready").iterdir())
    again = [event["name"] for event in lines(run / "timeline.jsonl") if event["process"] == "rewards"]
    assert not [row for order in ready if again.count(row := rows[order]) != 1]  # paid for once
    assert summary["prompts"] == 3
    assert summary["max_staleness_seen"] <= 2
    assert summary["weight_checksum_match"] is True
    low, high = summary["reward_gain_ci95"]
    assert low <= summary["reward_gain"] <= high
    assert set(summary["rewards_after"]) == {"format", "degradation", "understanding", "generation"}
    assert summary["engines"]["rollout"][0]["vllm"].startswith("0.32")
    assert summary["engines"]["learner"]["deepspeed"].startswith("0.19")
    for server, method in (("grounded_sam", "objects"), ("qwen_vl", "judge")):
        logs = (run / "logs" / "ray" / "serve").glob(f"replica_{server}_*.log")
        assert any(row["run"] == "tiny" and method in row["message"] for log in logs for row in lines(log))
    workers = worker_logs(run)
    assert {row["run"] for row in workers} == {"tiny"}
    trained = [row["step"] for row in workers if row["filename"] == "loop.py" and "step" in row]
    assert sorted(trained) == sorted(2 * list(range(len(stopped) + 1, 5)))  # two ranks
    loaded = {row["step"] for row in workers if row.get("name") == "actors.rollout_actor" and "step" in row}
    assert loaded >= set(range(len(stopped) + 1, 5))
    generated = {row["group_id"] for row in workers if row.get("name") == "actors.rollout_actor" and "group_id" in row}
    assert set(rows[2 * len(stopped) :]) - {rows[order] for order in ready} <= generated
    metrics = lines(run / "metrics.jsonl")
    assert [record["step"] for record in metrics] == [1, 2, 3, 4]
    assert [record["weights/version"] for record in metrics] == [1, 2, 3, 4]
    written = [record.keys() - {"step", "time_s"} for record in metrics]
    documented = {metric.name for metric in GRPO}
    assert all({metric.name for metric in GRPO if not metric.absent} <= names <= documented for names in written)
    live = {metric.name for metric in LIVE}
    last, any_step = (
        {f"ray_{prometheus_name(name)}" for name in live.union(*steps)}
        for steps in (written[-1:], written[len(stopped) :])
    )
    assert last <= seen <= any_step  # Ray forgets what the last step has not
    groups = {row["group_id"] for row in lines(run / "logs" / "driver.jsonl") if "group_id" in row}
    assert {f"epoch-0/train/{index:06d}" for index in order[:8]} <= groups
    assert metrics[0]["mismatch/max"] < 1e-4  # sampler and learner agree on fresh samples (pitfall 22)
    assert json.loads((run / "status.json").read_text())["state"] == "done"
    assert (run / "report.html").stat().st_size > 10_000
    assert list((run / "tensorboard").iterdir())
    assert (run / "checkpoints" / "tiny" / "policy" / "model.safetensors").is_file()


@pytest.mark.engine
@pytest.mark.timeout(600)
def test_ctrl_c_while_everything_starts_ends_all_processes_and_leaves_a_valid_run_directory(tmp_path):
    process = start(tmp_path, "stopped")
    for line in process.stdout:
        if "starting rollout actors" in line:
            break
    while len(children := descendants(process)) < 12:  # Ray, and the first engines
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=120)
    assert process.returncode == 130
    assert still_alive(children) == []
    run = tmp_path / "stopped"
    assert json.loads((run / "status.json").read_text())["state"] == "interrupted"
    assert not (run / "summary.json").exists()
    assert (run / "report.html").is_file()
