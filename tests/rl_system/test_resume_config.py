"""A run goes on with the settings it was made with, one writer at a time."""

from __future__ import annotations

import pytest

from rl_system.config.checks import check
from rl_system.config.compose import CONFIG_DIR, compose_config, to_yaml
from rl_system.config.resume import changed_settings
from rl_system.data.prompts import training_prompts
from rl_system.data.rows import Row
from rl_system.runs.directory import RunDirectory

pytestmark = pytest.mark.unit


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    monkeypatch.chdir(CONFIG_DIR.parent)


def yaml(*overrides: str) -> str:
    return to_yaml(compose_config(["experiment=toy", *overrides]))


def test_where_and_how_fast_a_run_works_may_change():
    elsewhere = [
        "resume=auto",
        "rollout.actors=3",
        "learner.checkpoint_every=1",
        "cluster.address=auto",
        "reward.grounded_sam.replicas=2",
        "+reward.qwen_vl.labels={rl.io/pool: reward-vlm}",
        "reward.client.attempts=2",
    ]
    assert changed_settings(yaml(), yaml(*elsewhere)) == []


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("seed=1", "seed=1 (was 0)"),
        ("learner.steps=50", "learner.steps=50 (was 40)"),
        ("learner.ranks=1", "learner.ranks=1 (was 2)"),
        ("coordination.max_staleness=0", "coordination.max_staleness=0 (was 1)"),
        ("reward.weights.format=0", "reward.weights.format=0.0 (was 1.0)"),
        ("reward=objects_file", "reward.objects=file (was grounded_sam)"),
        ("grpo.kl_beta=0", "grpo.kl_beta=0.0 (was 0.04)"),
    ],
)
def test_what_a_run_computes_may_not_change(override, said):
    assert changed_settings(yaml(), yaml(override)) == [said]


def test_a_run_is_found_again_unless_it_is_another_one(tmp_path):
    assert RunDirectory.resume(tmp_path, "run", yaml()) is None
    made = RunDirectory.create(tmp_path, "run", yaml())
    assert RunDirectory.resume(tmp_path, "run", yaml("resume=auto")) == made
    with pytest.raises(ValueError, match=r"run cannot go on with other settings: seed=3 \(was 0\)"):
        RunDirectory.resume(tmp_path, "run", yaml("seed=3"))
    (tmp_path / "other").mkdir()
    with pytest.raises(ValueError, match="not the directory of a run"):
        RunDirectory.resume(tmp_path, "other", yaml())


def test_one_process_writes_to_a_run(tmp_path):
    made = RunDirectory.create(tmp_path, "run", yaml())
    claim = made.lock()
    with pytest.raises(ValueError, match="being written to by another process"):
        made.lock()
    claim.close()
    made.lock().close()


def test_resume_and_overwrite_contradict_each_other():
    with pytest.raises(ValueError, match="choose one"):
        check(compose_config(["experiment=toy", "resume=auto", "overwrite=true"]))
    with pytest.raises(ValueError, match="resume=yes is not known; allowed: never, auto"):
        check(compose_config(["experiment=toy", "resume=yes"]))


@pytest.mark.parametrize("skip", [0, 3, 5, 13])
def test_prompts_go_on_where_they_were(skip):
    class Source:
        def row(self, index, split):
            return Row(f"{split}/{index}", None, None, "")

    class Builder:
        def build(self, row, group_id, seed):
            return row.row_id, group_id, seed

    whole = training_prompts(Source(), Builder(), 5, seed=7)
    later = training_prompts(Source(), Builder(), 5, seed=7, skip=skip)
    for _ in range(skip):
        next(whole)
    assert [next(later) for _ in range(12)] == [next(whole) for _ in range(12)]
