"""Attempts at a run that is kept in a store, without Ray: made, resumed, refused, overtaken."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from rl_system.cold_start import settings as cold_start
from rl_system.commands.attempts import claimed_run, existing_run, guarded
from rl_system.config.compose import ConfigError, load_config, to_yaml
from rl_system.config.resume import changed_settings
from rl_system.doctor.checks import disk
from rl_system.runs import claim as claims
from rl_system.runs import mirror as mirrors
from rl_system.runs.claim import Claim
from rl_system.runs.directory import RunStopped
from rl_system.runs.store import CLAIM, StoredRun

pytestmark = pytest.mark.unit


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """No waiting for another claimant, and this process's signals as they were."""
    monkeypatch.setattr(claims, "SETTLE_S", 0.0)
    before = {name: signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM)}
    yield
    for name, handler in before.items():
        signal.signal(name, handler)


@pytest.fixture
def settings(tmp_path):
    return SimpleNamespace(
        name="mine",
        output_dir=f"file://{tmp_path}/store",
        scratch_dir=str(tmp_path / "scratch"),
        overwrite=False,
        resume="auto",
    )


def attempt(settings, execute, yaml="seed: 0\n"):
    run, keeper, resumed = claimed_run(settings, yaml, existing_run(settings, yaml))
    code, summary = guarded("rl-system train", run, keeper, lambda: execute(run), lambda: run.report.write_text("page"))
    return code, summary, resumed


def stop_after_a_step(run):
    run.metrics.write_text('{"step": 1}\n')
    raise RunStopped("stopped after step 1 of 2")


def test_a_stopped_run_goes_on_from_what_the_store_has(settings, tmp_path, capsys):
    assert attempt(settings, stop_after_a_step) == (75, None, False)
    said = capsys.readouterr().err
    assert f"stopped after step 1 of 2; resume=auto goes on with file://{tmp_path}/store/mine" in said
    assert list((tmp_path / "scratch").iterdir()) == []
    stored = existing_run(settings, "seed: 0\n")
    assert isinstance(stored, StoredRun) and stored.status()["state"] == "stopped"
    assert set(stored.list()) >= {"config.yaml", "metrics.jsonl", "report.html", "status.json", "logs/driver.jsonl"}

    def finish(run):
        assert run.metrics.read_text() == '{"step": 1}\n' and run.name == "mine" and run.tensorboard.is_dir()
        with pytest.raises(ValueError, match="is being written to by attempt"):
            claimed_run(settings, "seed: 0\n", stored)
        run.metrics.write_text('{"step": 1}\n{"step": 2}\n')
        return {"steps": 2}

    assert attempt(settings, finish) == (0, {"steps": 2}, True)
    assert stored.status()["state"] == "done" and stored.read("metrics.jsonl").count(b"\n") == 2
    assert stored.read(CLAIM) is None and list((tmp_path / "scratch").iterdir()) == []


def test_a_run_that_is_there_is_neither_overwritten_nor_continued_with_other_settings(settings, tmp_path):
    attempt(settings, stop_after_a_step)
    with pytest.raises(ValueError, match=r"mine cannot go on with other settings: seed=1 \(was 0\)"):
        existing_run(settings, "seed: 1\n")
    settings.resume, settings.overwrite = "never", True
    with pytest.raises(ValueError, match=r"mine exists already: .* overwrite=true moves nothing aside in a store"):
        claimed_run(settings, "seed: 1\n", existing_run(settings, "seed: 1\n"))
    leftovers = tmp_path / "store/other/checkpoints/other"
    leftovers.mkdir(parents=True)
    (leftovers / "checkpoint_manager_snapshot.json").write_text("{}")  # a learner would go on from it
    settings.name = "other"
    with pytest.raises(ValueError, match="other exists already"):
        claimed_run(settings, "seed: 1\n", None)
    assert not (tmp_path / "store/other" / CLAIM).exists() and list((tmp_path / "scratch").iterdir()) == []


def test_an_attempt_that_is_overtaken_ends_with_a_message_and_leaves_the_store_alone(
    settings, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(mirrors, "EVERY_S", 0.01)
    place = tmp_path / "store/mine"
    others = []

    def hang(run):
        (place / CLAIM).unlink()
        others.append(Claim.take(StoredRun.at(f"file://{place}"), lambda _: None))
        for _ in range(6000):
            time.sleep(0.01)
        raise AssertionError("nobody has ended this attempt")

    assert attempt(settings, hang) == (1, None, False)
    said = capsys.readouterr().err
    assert "was taken over by attempt" in said and "what the store does not have is in" in said
    copy = Path(said.split()[-1])
    assert json.loads((copy / "status.json").read_text())["state"] == "failed"
    assert json.loads((place / "status.json").read_text())["state"] == "running"
    others[0].renew()


URI = "s3://bucket/runs?region=eu-central-1&scheme=http"


def test_settings_keep_a_uri_and_refuse_credentials_in_it():
    config = load_config(["experiment=toy", f'output_dir="{URI}"', "scratch_dir=scratch"])
    assert config.output_dir == URI and config.scratch_dir == str(Path("scratch").resolve())
    toy = ["recipe=toy", "data=x"]
    assert cold_start.load([*toy, f"output_dir={URI}"]).output_dir == URI
    for load, given in ((load_config, ["experiment=toy"]), (cold_start.load, toy)):
        with pytest.raises(ConfigError, match=r"output_dir=s3://\.\.\.@bucket/runs holds credentials"):
            load([*given, "output_dir=s3://key:secret@bucket/runs"])


def test_doctor_asks_the_store_instead_of_a_disk(tmp_path):
    plan = SimpleNamespace(checkpoint=1, policy_file=1)
    config = load_config(["experiment=toy", f"output_dir=file://{tmp_path}/store"])
    store, temporary = disk(config, plan)
    assert store.name == "output_dir" and store.good and f"file://{tmp_path}/store/" in store.found
    assert temporary.name == "temporary files"
    config.output_dir = "foo://bucket/runs"
    store, _ = disk(config, plan)
    assert not store.good and "Unrecognized filesystem type" in store.found


def test_where_a_run_is_kept_may_change_when_it_goes_on():
    before, now = (to_yaml(load_config(["experiment=toy", *more])) for more in ([], [f'output_dir="{URI}"']))
    assert changed_settings(before, now) == []


def test_a_scratch_folder_that_cannot_be_made_is_refused_and_gives_the_run_free(settings, tmp_path):
    (tmp_path / "file").write_text("")
    settings.scratch_dir = os.fspath(tmp_path / "file" / "folder")
    with pytest.raises(ValueError, match=r"scratch_dir=.*cannot be used"):
        claimed_run(settings, "seed: 0\n", None)
    assert not (tmp_path / "store/mine" / CLAIM).exists()
