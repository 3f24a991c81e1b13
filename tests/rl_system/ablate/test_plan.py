"""The commands of a study, what is refused, and how stages are run."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from rl_system.cold_start import settings as cold_start
from rl_system.commands.main import main
from rl_system.config.compose import compose_config
from rl_system.studies.ablate import run, settings
from rl_system.studies.ablate.plan import Plan, Stage, make_plan, policy_directory
from vlcot.policy.family import Family
from vlcot.sequence import CHAIN_TAGS

pytestmark = pytest.mark.unit


@pytest.fixture
def given(tmp_path: Path) -> list[str]:
    for name in ("photographs", "lr", "hr"):
        (tmp_path / name).mkdir()
    folders = {"photographs": "photographs", "test_lr": "lr", "test_hr": "hr", "output": "out"}
    return [f"{key}={tmp_path / name}" for key, name in folders.items()] + ["captions=c.jsonl"]


def commands(plan: Plan, kind: str) -> list[tuple[str, ...]]:
    return [stage.command for stage in plan.stages if stage.command[0] == kind]


def test_variants_that_leave_out_the_same_share_their_cold_start(given):
    plan = make_plan(settings.load(["study=toy", *given, "seeds=[0,1]"]))
    assert list(plan.layouts) == ["full", "no_degradation_output", "no_understanding_output", "one_step"]
    assert plan.layouts["full"] == CHAIN_TAGS
    assert plan.layouts["one_step"] == ("degradation", "rough_understand", "final_image")
    assert len(commands(plan, "prepare-data")) == 4 and len(commands(plan, "cold-start")) == 8
    trained = [v for v in settings.load(["study=toy", *given]).variants.values() if v.train is not None]
    assert len(commands(plan, "train")) == 2 * len(trained)
    assert len(commands(plan, "restore")) == len(plan.results) == 2 * (len(trained) + 1)
    assert len({stage.name for stage in plan.stages}) == len(plan.stages)


def test_the_policy_before_grpo_is_the_cold_start_of_the_base_and_is_measured_before_its_run(given):
    results = {r.method: r for r in make_plan(settings.load(["study=toy", *given])).results}
    full, before = results["full-0"], results["no_grpo-0"]
    assert (before.run, before.moment, full.run, full.moment) == (full.run, "before", full.run, "after")
    assert "cold-start" in before.policy.parts and "train" in full.policy.parts
    [train] = [c for c in commands(make_plan(settings.load(["study=toy", *given])), "train") if "name=full-0" in c]
    assert f"policy.path={before.policy}" in train


@pytest.mark.parametrize("study", ["toy", "realsr_r1_7b"])
def test_every_override_of_the_shipped_studies_is_known_to_its_command(given, tmp_path, monkeypatch, study):
    if study != "toy":
        (tmp_path / "models").mkdir()
        for name, source in {"policy": "policy", "vq": "vq"}.items():
            (tmp_path / "models" / name).symlink_to(Path(f"toy/weights/{source}").resolve())
        monkeypatch.chdir(tmp_path)
    plan = make_plan(settings.load([f"study={study}", *given]))
    for command in commands(plan, "train"):
        compose_config(list(command[1:]))
    keys = {"policy.path", "policy.image_tokenizer"}
    for command in commands(plan, "cold-start"):
        family = "toy/weights/policy" if study == "toy" else "models/policy"
        own = [o for o in command[1:] if o.split("=")[0] not in keys] + [f"policy.path={family}"]
        cold_start.load([*own, f"policy.image_tokenizer={family.replace('policy', 'vq')}"])


def test_a_layout_directory_is_a_family_of_its_own(given):
    config = settings.load(["study=toy", *given])
    plan = make_plan(config)
    run.write_layouts(config, plan)
    for name, blocks in plan.layouts.items():
        directory = policy_directory(config, name)
        assert Family.from_pretrained(directory).layout.blocks == blocks
        assert (directory / "model.safetensors").samefile(Path(config.policy) / "model.safetensors")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("study=other", "choose one study=realsr_r1_7b|toy"),
        ("seeds=[]", "seeds=[]"),
        ("seeds=[1,1]", "seeds=[1, 1]"),
        ("only=[one_step]", "lacks full"),
        ("only=[full,other]", "no variant other"),
        ("test_hr=nowhere", "test_hr=nowhere"),
        ("captions=''", "captions=... is missing"),
        ("variants.one_step.without=[mood]", "the chain has no mood"),
        ("variants.one_step.without=[middle_image]", "variants.one_step: layout: blocks need"),
        ("policy=nowhere", "policy=nowhere"),
    ],
)
def test_what_cannot_be_run_is_refused_with_one_message(given, capsys, override, said):
    overrides = ["study=toy", *given] if not override.startswith("study") else given
    assert main(["ablate", *overrides, override]) == 2
    error = capsys.readouterr().err
    assert said in error and len(error.strip().splitlines()) == 1


@pytest.fixture
def study(given, monkeypatch):
    """A study of two stages that are Python programs."""
    config = settings.load(["study=toy", *given])
    Path(config.output).mkdir()
    monkeypatch.setattr(run, "_COMMAND", (sys.executable, "-c"))
    note = Path(config.output) / "ran"
    stages = [Stage(n, (f"open({str(note)!r}, 'a').write({n!r}); print('said')",)) for n in ("a", "b")]
    return config, Plan({}, tuple(stages), ()), note


def test_a_stage_that_is_done_is_not_run_again(study):
    config, plan, note = study
    said: list[str] = []
    run.run_stages(config, replace(plan, stages=plan.stages[:1]), said.append)
    run.run_stages(config, plan, said.append)
    run.run_stages(config, plan, said.append)
    assert note.read_text() == "ab" and said == ["[1/1] a", "[2/2] b"]
    assert (Path(config.output) / "logs" / "b.log").read_text() == "said\n"
    assert json.loads((Path(config.output) / "done" / "b.json").read_text())["command"] == list(plan.stages[1].command)


def test_a_failed_stage_ends_the_study_with_what_it_said_and_is_run_again(study):
    config, plan, note = study
    broken = Stage("b", ("import sys; print('why it broke'); sys.exit(75)",))
    with pytest.raises(run.StageFailed, match=r"b ended with 75; its output is in .*b\.log") as failed:
        run.run_stages(config, replace(plan, stages=(plan.stages[0], broken)), lambda _: None)
    assert failed.value.code == 75 and "why it broke" in str(failed.value)
    run.run_stages(config, plan, lambda _: None)
    assert note.read_text() == "ab"


def test_a_study_that_was_begun_with_other_settings_is_refused_before_anything_runs(study):
    config, plan, note = study
    run.run_stages(config, replace(plan, stages=plan.stages[1:]), lambda _: None)
    other = Stage("b", ("print('other')",))
    with pytest.raises(ValueError, match="b is done, but not with print"):
        run.run_stages(config, replace(plan, stages=(plan.stages[0], other)), lambda _: None)
    assert note.read_text() == "b"
