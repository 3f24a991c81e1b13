"""Weights & Biases and MLflow: the real packages where they are, and what is refused where they are not."""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace

import pytest

from rl_system.runs import trackers
from rl_system.runs.directory import RunDirectory
from rl_system.runs.trackers import check_trackers, open_trackers

pytestmark = pytest.mark.unit


@pytest.fixture
def run(tmp_path):
    return RunDirectory.create(tmp_path, "toy", "name: toy\nlearner: {steps: 2}\n")


def log(names: list[str], run: RunDirectory, step: int) -> None:
    for sink in open_trackers(names, run):
        sink.log(step, {"reward/total": 1.0 + step})
        sink.close()


def test_unknown_names_and_missing_packages_are_refused(monkeypatch):
    check_trackers([])
    with pytest.raises(ValueError, match=r"trackers=\[tensorboard\] is not known; allowed: wandb, mlflow"):
        check_trackers(["tensorboard"])
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"trackers=\[wandb\] needs the package wandb, which is not installed"):
        check_trackers(["wandb"])


def test_both_get_names_steps_settings_and_the_same_run_again(run, monkeypatch):
    said = []
    noted = SimpleNamespace(log=lambda m, step: said.append((step, m)), finish=lambda: said.append("sent"))
    wandb = SimpleNamespace(init=lambda **options: said.append(options) or noted)
    mlflow = SimpleNamespace(
        start_run=lambda **options: said.append(options) or SimpleNamespace(info=SimpleNamespace(run_id="r1")),
        log_params=said.append,
        log_metrics=lambda m, step: said.append((step, m)),
        end_run=lambda: said.append("ended"),
    )
    monkeypatch.setattr(trackers, "import_module", {"wandb": wandb, "mlflow": mlflow}.__getitem__)
    log(["wandb"], run, 1)
    assert (said[0]["name"], said[0]["resume"], said[0]["config"]["learner.steps"]) == ("toy", "allow", 2)
    assert said[1:] == [(1, {"reward/total": 2.0}), "sent"]
    said.clear()
    log(["mlflow"], run, 1)
    log(["mlflow"], run, 2)
    settings = {"name": "toy", "learner.steps": 2}
    first = [{"run_name": "toy"}, settings, (1, {"reward/total": 2.0}), "ended"]
    assert said == [*first, {"run_id": "r1"}, (2, {"reward/total": 3.0}), "ended"]


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")
def test_the_real_wandb_offline(run, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    log(["wandb"], run, 1)
    assert list((run.path / "wandb").glob("offline-run-*/*.wandb"))


@pytest.mark.skipif(importlib.util.find_spec("mlflow") is None, reason="mlflow is not installed")
def test_the_real_mlflow_in_a_folder(run, monkeypatch, tmp_path):
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file://{tmp_path}/mlruns")
    log(["mlflow"], run, 1)
    log(["mlflow"], run, 2)
    (values,) = (tmp_path / "mlruns").glob("*/*/metrics/reward/total")
    assert [line.split()[1:] for line in values.read_text().splitlines()] == [["2.0", "1"], ["3.0", "2"]]
