"""The paper's ablations as one-line choices: which rewards count, who judges, and which servers that needs."""

from __future__ import annotations

from copy import deepcopy
from functools import reduce
from pathlib import Path
from typing import Any

import pytest
import torch

from reward_servers.deploy import deploy
from rl_system import assembly, reward_apps
from rl_system.config.checks import check
from rl_system.config.compose import CONFIG_DIR, compose_config, load_config
from rl_system.config.schema import RewardWeightsConfig, TrainConfig
from rl_system.config.servers import checkpoints, servers
from vlcot.metrics import METRICS
from vlcot.rewards import METRIC_EXPERTS

pytestmark = pytest.mark.unit
DETECTOR = Path("toy/weights/grounding_dino")

SERVERS_OF = {
    "paper": ("grounded_sam", "qwen_vl"),
    "no_format": ("grounded_sam", "qwen_vl"),
    "no_degradation": ("grounded_sam", "qwen_vl"),
    "no_understanding": ("qwen_vl",),
    "no_generation": ("grounded_sam",),
    "perceptual": ("grounded_sam", "iqa"),
    "perceptual_offline": ("grounded_sam", "iqa"),
    "generative": ("grounded_sam", "iqa"),
    "objects_tagged": ("grounded_sam", "qwen_vl"),
    "objects_qwen_vl": ("qwen_vl",),
    "objects_file": ("qwen_vl",),
}


@pytest.fixture(autouse=True)
def in_the_repository_without_metric_weights(monkeypatch, tmp_path):
    monkeypatch.chdir(CONFIG_DIR.parent)
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))


@pytest.fixture(scope="module")
def composed():
    """One choice of each expert, composed once."""
    choices = {"qwen_vl": "paper", "perceptual": "perceptual", "generative": "generative"}
    return {expert: compose_config(["experiment=toy", f"reward={choice}"]) for expert, choice in choices.items()}


def changed(config: TrainConfig, **settings: Any) -> TrainConfig:
    """A copy of ``config`` with other values below ``reward``; ``__`` stands for a dot."""
    config = deepcopy(config)
    for key, value in settings.items():
        *parents, name = key.split("__")
        setattr(reduce(getattr, parents, config.reward), name, value)
    return config


def refused(config: TrainConfig, **settings: Any) -> str:
    with pytest.raises(ValueError) as error:
        check(changed(config, **settings))
    message = str(error.value)
    assert "\n" not in message
    return message


def test_every_choice_that_ships_is_named_here():
    assert {path.stem for path in (CONFIG_DIR / "reward").glob("*.yaml")} == set(SERVERS_OF)


@pytest.mark.parametrize("choice", SERVERS_OF)
def test_a_run_needs_exactly_the_servers_of_its_rewards(choice):
    config = compose_config(["experiment=toy", f"reward={choice}"])
    used = SERVERS_OF[choice]
    assert servers(config) == used
    assert tuple(assembly.reward_apps(config)) == used
    demanded = [d.setting.split(".")[1] for d in assembly.demands(config) if d.setting.startswith("reward.")]
    assert tuple(demanded) == used
    assert {key.split(".")[1] for key in checkpoints(config) if key.startswith("reward.")} == {*used} - {"iqa"}
    off = [name for name, weight in vars(config.reward.weights).items() if weight == 0]
    assert off == ([choice.removeprefix("no_")] if choice.startswith("no_") else [])


def test_metrics_that_need_no_weights_run_offline():
    config = load_config(["experiment=toy", "reward=perceptual_offline"])
    assert assembly.iqa_config(config).metrics == ("PSNR", "SSIM")


@pytest.mark.parametrize("expert", METRIC_EXPERTS)
def test_a_metric_without_its_weights_is_refused_by_name_and_file(composed, expert, tmp_path):
    message = refused(composed[expert], iqa__weights_dir=str(tmp_path))
    assert message.startswith("reward.iqa.weights_dir: ") and str(tmp_path) in message
    for name in METRIC_EXPERTS[expert]:
        for file in METRICS[name].weights:
            assert f"{name} needs " in message and file in message


def test_with_its_weights_every_metric_of_the_expert_is_measured(composed, tmp_path):
    for name in METRIC_EXPERTS["perceptual"]:
        for file in METRICS[name].weights:
            (tmp_path / file).touch()
    config = changed(composed["perceptual"], iqa__weights_dir=str(tmp_path))
    check(config)
    assert assembly.iqa_config(config).metrics == METRIC_EXPERTS["perceptual"]


@pytest.mark.parametrize(
    ("expert", "settings", "said"),
    [
        ("qwen_vl", {"expert": "gpt"}, "reward.expert=gpt is not known; allowed: qwen_vl, perceptual, generative"),
        ("qwen_vl", {"timeout_s": float("inf")}, "reward.timeout_s=inf must be positive and finite"),
        ("qwen_vl", {"grounded_sam__box_threshold": 1.5}, "reward.grounded_sam.box_threshold must lie in [0, 1]"),
        ("qwen_vl", {"grounded_sam__vocabulary": 5}, "reward.grounded_sam.vocabulary=5 is no list of names"),
        ("qwen_vl", {"grounded_sam__vocabulary": ["unicorn"]}, "does not know unicorn"),
        ("qwen_vl", {"grounded_sam__vocabulary": "/nowhere"}, "reward.grounded_sam.vocabulary: cannot read /nowhere"),
        ("qwen_vl", {"qwen_vl__repeats": 0}, "reward.qwen_vl.repeats must be"),
        ("qwen_vl", {"iqa__metrics": ["PSNR"]}, "has no meaning with reward.expert=qwen_vl"),
        ("qwen_vl", {"weights": RewardWeightsConfig(0, 0, 0, 0)}, "every reward off"),
        ("perceptual", {"iqa__metrics": ["PSNR", "MUSIQ"]}, "must be some of LPIPS, DISTS, PSNR, SSIM"),
        ("perceptual", {"iqa__metrics": ["PSNR", "PSNR"]}, "each once"),
        ("perceptual", {"iqa__weights_dir": "/nowhere"}, "reward.iqa.weights_dir=/nowhere: no such folder"),
        ("perceptual", {"iqa__replicas": 0}, "reward.iqa.replicas=0 is too small"),
        ("perceptual", {"iqa__autoscaling__max_replicas": 0}, "reward.iqa.autoscaling.max_replicas=0 is below"),
        ("perceptual", {"iqa__labels": {"rl.io/pool/": "x"}}, "reward.iqa.labels={rl.io/pool/: x} is no node label"),
    ],
)
def test_an_impossible_choice_is_refused_with_one_clear_message(composed, expert, settings, said):
    assert said in refused(composed[expert], **settings)


def test_a_server_that_is_not_asked_needs_no_checkpoint(composed):
    nowhere = {"grounded_sam__detector": "/nowhere", "qwen_vl__model": "/nowhere"}
    assert "reward.grounded_sam.detector=/nowhere" in refused(composed["qwen_vl"], **nowhere)
    assert "reward.qwen_vl.model=/nowhere" in refused(composed["qwen_vl"], weights__understanding=0, **nowhere)
    check(changed(composed["perceptual"], iqa__metrics=["PSNR"], weights__understanding=0, **nowhere))


def test_the_format_reward_alone_starts_no_server() -> None:
    """Serve refuses to run no application; this touches neither Serve nor Ray."""
    off = [f"reward.weights.{name}=0" for name in ("degradation", "understanding", "generation")]
    config = load_config(["experiment=toy", *off])
    assert servers(config) == ()
    assert deploy(reward_apps.applications(config)) == {}


def test_a_choice_of_rewards_leaves_an_experiment_its_servers():
    config = compose_config(["experiment=realsr_r1_7b", "reward=objects_tagged"])
    assert (config.reward.objects, config.reward.qwen_vl.model) == ("tagged_grounded_sam", "models/qwen_vl")


@pytest.mark.parametrize("broken", ["tokenizer.json", "config.json"])
def test_a_detector_with_a_damaged_file_is_refused_with_one_clear_message(tmp_path, broken):
    for name in ("tokenizer.json", "config.json"):
        (tmp_path / name).write_text('{"model"' if name == broken else (DETECTOR / name).read_text())
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ValueError, match=r"grounded_sam\.detector: cannot load"):
        load_config(["experiment=toy", f"reward.grounded_sam.detector={tmp_path}"])
