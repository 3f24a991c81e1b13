"""Exit codes and messages of ``rl-system doctor``."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from rl_system.commands.main import main
from rl_system.doctor import checks

pytestmark = pytest.mark.unit
PAPER = "experiment=realsr_r1_7b"
TOY = Path("toy/weights")


def doctor(capsys, *args: str) -> tuple[int, str]:
    code = main(["doctor", *args])
    captured = capsys.readouterr()
    return code, " ".join((captured.out + captured.err).split())


def test_the_paper_fits_eight_gpus_of_80_gb_planned_without_one(capsys):
    code, text = doctor(capsys, PAPER, "--gpus", "8x80")
    assert code == 0, text
    assert "All fits" in text and "models/policy is not here: planned with the published model" in text
    assert "room for 4 groups of longest chains, 12 sequences" in text


def test_json_has_the_plan_in_bytes(capsys):
    assert main(["doctor", PAPER, "--gpus", "8x80", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    rank = next(p for p in found["processes"] if p["kind"] == "learner rank")
    assert found["good"] and found["problems"] == []
    assert rank["parts"]["optimizer"] == 3 * 7_080_775_680
    assert rank["gpu_bytes"] == sum(rank["parts"].values())


def test_too_small_gpus_are_named_with_the_settings_that_would_fit(capsys):
    code, text = doctor(capsys, PAPER, "--gpus", "16x40")
    assert code == 1
    assert "learner rank: " in text and "It would fit with" in text and "learner.ranks=" in text
    assert "Not ready" in text


def test_more_gpus_are_named_where_no_setting_helps(capsys):
    code, text = doctor(capsys, PAPER, "--gpus", "8x40")
    assert code == 1
    assert "No setting makes it fit: take larger GPUs, or more of them with learner.ranks=" in text


def test_too_few_gpus(capsys):
    code, text = doctor(capsys, "--gpus", "4x80", PAPER, "--memory", "512", "seed=1")  # in any order
    assert code == 1
    assert "4 of 74.5 GiB; needed 8" in text


def test_the_toy_is_ready_here(capsys):
    code, text = doctor(capsys, "experiment=toy", "--memory", "64")
    assert code == 0, text
    assert "toy/weights/policy, 2,167,488 values" in text and "as in requirements/cpu.txt" in text


def test_too_little_memory_names_a_setting(capsys):
    code, text = doctor(capsys, "experiment=toy", "rollout.kv_cache_gib=20", "--memory", "14")
    assert code == 1
    assert "host memory: " in text and "It would fit with rollout.kv_cache_gib=5.0" in text


def test_missing_weights_name_the_setting_and_what_makes_them(capsys):
    code, text = doctor(capsys, "experiment=toy", "policy.path=nowhere", "--memory", "64")
    assert code == 1
    assert "no checkpoint at nowhere" in text
    assert "give policy.path=DIR; `rl-system import-weights policy` makes it" in text


def test_a_file_that_is_cut_off_is_named(capsys, tmp_path):
    shutil.copytree(TOY / "vq", tmp_path / "vq")
    file = tmp_path / "vq/model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    code, text = doctor(capsys, "experiment=toy", f"policy.image_tokenizer={tmp_path / 'vq'}")
    assert code == 1
    assert "policy.image_tokenizer" in text and "model.safetensors is truncated" in text


def test_weights_of_another_model(capsys):
    code, text = doctor(capsys, "experiment=toy", "policy.image_tokenizer=toy/weights/sam")
    assert code == 1
    assert "is of type 'sam', not 'janus_vqgan'" in text


def test_what_train_would_refuse_once_the_weights_are_there(capsys):
    code, text = doctor(capsys, "experiment=toy", "rollout.max_new_tokens=100", "--memory", "64")
    assert code == 1
    assert "rollout.max_new_tokens=100 is too small: the images alone take 110 tokens" in text


def test_a_disk_that_is_too_small(capsys, monkeypatch):
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(checks.shutil, "disk_usage", lambda _: usage._replace(free=10))
    code, text = doctor(capsys, "experiment=toy", "--memory", "64")
    assert code == 1
    assert "0.0 GiB free, 0.1 needed" in text and "lower learner.keep_checkpoints" in text


def test_another_version_than_the_pinned_one(capsys, monkeypatch):
    monkeypatch.setattr(checks, "version", lambda name: "0.1")
    code, text = doctor(capsys, "experiment=toy", "--memory", "64")
    assert code == 1
    assert "deepspeed 0.1, not 0.19.8" in text and "make setup ACCELERATOR=cpu" in text


def test_servers_that_do_not_answer(capsys, monkeypatch):
    monkeypatch.setenv("RL_REWARD_TOKEN", "a" * 32)
    code, text = doctor(capsys, "experiment=toy", "reward.url=http://127.0.0.1:9", "--memory", "64")
    assert code == 1
    assert "nobody answers at 127.0.0.1:9" in text


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["experiment=toy", "rollout.actor=2"], "did you mean 'rollout.actors'?"),
        (["experiment=toy", "rollout.group_size=1"], "rollout.group_size=1 is too small"),
        (["experiment=toy", "--gpus", "eight"], "--gpus eight is not COUNTxGB, such as 8x80"),
        (["experiment=toy", "--memory", "-3"], "--memory -3 must be a positive number of GiB"),
        (["rollout.actors=2"], "say which experiment to run"),
        ([], "KEY=VALUE"),
    ],
)
def test_bad_input_ends_with_2(capsys, args, message):
    code, text = doctor(capsys, *args)
    assert code == 2
    assert message in text


def test_gpus_that_are_shared_are_not_given_away_twice(capsys):
    code, text = doctor(capsys, PAPER, "reward.qwen_vl.num_gpus=0.5", "--gpus", "8x80")
    assert code == 1
    assert "reward.qwen_vl.num_gpus=0.5, but vLLM takes gpu_memory_utilization=0.9 of the GPU" in text
