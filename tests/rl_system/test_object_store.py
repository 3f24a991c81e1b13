"""Runs on a real S3-compatible server: round trip, claims, refusals, and a training run that moves elsewhere."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from rl_system.commands.main import main
from rl_system.config.uris import below
from rl_system.runs.claim import Claim
from rl_system.runs.directory import RunDirectory
from rl_system.runs.mirror import Mirror
from rl_system.runs.sinks import open_sinks
from rl_system.runs.store import CLAIM, StoredRun, StoreError
from tests.s3_server import BUCKET, KEYS, S3Server, s3_server

pytestmark = pytest.mark.engine

ROOT = Path(__file__).resolve().parents[2]
TINY = ["learner.steps=5", "learner.groups_per_step=2", "learner.warmup_steps=0", "learner.checkpoint_every=1"]
TINY += ["evaluation.prompts=2", "reward.weights.understanding=0", "reward.weights.generation=0", "resume=auto"]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with s3_server(tmp_path_factory.mktemp("s3")) as made:
        yield made


@pytest.fixture(autouse=True)
def keys(monkeypatch):
    monkeypatch.chdir(ROOT)
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)


def hashes(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.timeout(300)
def test_files_come_back_byte_by_byte_and_a_writer_that_was_overtaken_stops(server: S3Server, tmp_path):
    stored = StoredRun.at(server.uri(f"{BUCKET}/runs/trip"))
    copy = tmp_path / "trip"
    run = RunDirectory.create(tmp_path, "trip", "seed: 0\n")
    (run.logs / "driver.jsonl").write_bytes(os.urandom(12 << 20))  # more than one part
    (run.groups / "000001").mkdir()
    (run.groups / "000001/lr.png").write_bytes(b"")
    mirror = Mirror(stored, copy, Claim.take(stored))
    mirror.flush()
    shutil.rmtree(run.groups / "000001")
    run.journal.write_text("{}\n")
    mirror.flush()
    stored.fetch(tmp_path / "fetched")
    assert hashes(tmp_path / "fetched") == hashes(copy) and len(hashes(copy)) == 4

    with pytest.raises(ValueError, match="is being written to by attempt"):
        Claim.take(stored)
    stored.delete(CLAIM)  # what a stale claim comes to
    Claim.take(stored, lambda _: None)
    run.journal.write_text("{}\n{}\n")
    with pytest.raises(StoreError, match="was taken over by attempt"):
        mirror.flush()
    assert stored.read("journal.jsonl") == b"{}\n"


@pytest.mark.timeout(300)
def test_a_store_that_cannot_be_used_ends_the_command_with_one_message(server: S3Server, monkeypatch, capsys):
    def refused(uri: str, *overrides: str) -> str:
        assert main(["train", "experiment=toy", f'output_dir="{uri}"', *overrides]) == 2
        message = capsys.readouterr().err.strip()
        assert len(message.splitlines()) == 1 and message.startswith("rl-system train: ")
        return message

    assert "there is no nowhere" in refused(server.uri("nowhere/runs"))
    assert "NETWORK_CONNECTION" in refused(
        f"s3://{BUCKET}/runs?endpoint_override=127.0.0.1:1&scheme=http", "resume=auto"
    )
    old = StoredRun.at(server.uri(f"{BUCKET}/runs/old"))
    old.write("config.yaml", b"seed: 0\n")
    assert "old?endpoint_override" in (said := refused(server.uri(f"{BUCKET}/runs"), "name=old", "overwrite=true"))
    assert "exists already: choose another run name" in said and set(old.list()) == {"config.yaml"}
    assert "cannot go on with other settings: " in refused(server.uri(f"{BUCKET}/runs"), "name=old", "resume=auto")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    assert "cannot be used" in refused(server.uri(f"{BUCKET}/runs"))


@pytest.mark.timeout(120)
def test_report_and_status_read_a_copy(server: S3Server, tmp_path, monkeypatch, capsys):
    run = RunDirectory.create(tmp_path, "seen", "seed: 0\nname: seen\n")
    sink = open_sinks(run)
    sink.log(1, {"reward/total": 1.25, "time/step": 2.0})
    sink.close()
    run.set_status("stopped", "stopped after step 1 of 3")
    stored = StoredRun.at(server.uri(f"{BUCKET}/runs/seen"))
    Mirror(stored, run.path, Claim.take(stored)).close()
    monkeypatch.chdir(tmp_path)
    assert main(["status", stored.uri]) == 0
    said = capsys.readouterr().out
    assert f"{stored.uri}: stopped" in said and "step 1: reward 1.250" in said
    assert main(["report", stored.uri]) == 0
    assert (
        capsys.readouterr().out.strip() == "seen.html" and "stopped after step 1 of 3" in Path("seen.html").read_text()
    )
    assert main(["status", server.uri(f"{BUCKET}/runs/none")]) == 2
    assert "is not a run" in capsys.readouterr().err


def train(uri: str, scratch: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "rl_system", "train", "experiment=toy", "name=moved", f'output_dir="{uri}"']
    return subprocess.Popen(
        [*command, *TINY, f"scratch_dir={scratch}"],
        cwd=ROOT,
        env={**os.environ, "RAY_AUTH_MODE": "disabled", "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.timeout(600)
def test_a_run_is_stopped_and_goes_on_where_nothing_of_it_is_on_the_disk(server: S3Server, tmp_path):
    runs = server.uri(f"{BUCKET}/training")
    stored = StoredRun.at(below(runs, "moved"))
    said = []
    process = train(runs, tmp_path / "first")
    for line in process.stdout:
        said.append(line)
        if line.startswith("step 1/5"):
            process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=120) == 75, "".join(said)[-4000:]
    assert list((tmp_path / "first").iterdir()) == []
    done = len(stored.read("metrics.jsonl").splitlines())
    assert stored.status()["state"] == "stopped" and 1 <= done < 5 and stored.read(CLAIM) is None

    process = train(runs, tmp_path / "second")
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 0, output[-4000:]
    assert "evaluating before" not in output and f"step {done}/5" not in output
    assert list((tmp_path / "second").iterdir()) == [] and stored.read(CLAIM) is None
    run = RunDirectory(tmp_path / "fetched" / "moved", stored)
    stored.fetch(run.path)
    rows = [row for line in run.journal.read_text().splitlines() for row in json.loads(line)["rows"].values()]
    order = np.random.default_rng([0, 0]).permutation(4096)
    assert rows == [f"epoch-0/train/{index:06d}" for index in order[:10]]
    summary = json.loads(run.summary.read_text())
    assert summary["steps"] == 5 and summary["groups_trained"] == 10 and summary["weight_checksum_match"] is True
    assert [json.loads(line)["step"] for line in run.metrics.read_text().splitlines()] == [1, 2, 3, 4, 5]
    assert run.status()["state"] == "done" and run.report.stat().st_size > 10_000 and list(run.tensorboard.iterdir())
    policy = run.local_policy(Path(run.learner_storage[0]) / "moved" / "policy")
    assert {path.name for path in policy.iterdir()} >= {"config.json", "model.safetensors", "tokenizer.json"}
