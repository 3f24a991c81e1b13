"""Kept groups and stored evaluations."""

from __future__ import annotations

import numpy as np
import pytest

from rl_system.runs.directory import RunDirectory
from rl_system.runs.evaluation_files import read_evaluation, write_evaluation
from rl_system.runs.groups import GroupStore, read_groups
from rl_system.runs.pictures import read_png
from tests.rl_system.runs.synthetic import HOSTILE, evaluated, scored_group

pytestmark = pytest.mark.unit


def test_the_best_and_the_worst_groups_are_kept_and_replaced_ones_are_removed(tmp_path):
    store = GroupStore(tmp_path, keep=2)
    means = [1.0, 1.5, 1.2, 0.4, 1.3, 2.0, 1.1]
    kept = [store.offer(scored_group(i, mean, side=16)) for i, mean in enumerate(means)]
    assert kept == [True, True, True, True, True, True, False]  # 1.3 replaces 1.2, 2.0 replaces 1.3
    groups = read_groups(tmp_path)
    assert [g.mean_total for g in groups] == pytest.approx([2.0, 1.5, 1.0, 0.4])
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(g.folder.name for g in groups)


def test_a_store_opened_again_goes_on_with_what_is_there(tmp_path):
    GroupStore(tmp_path, keep=1).offer(scored_group(0, 1.0, side=16))
    again = GroupStore(tmp_path, keep=1)
    assert again.offer(scored_group(1, 2.0, side=16)) and again.offer(scored_group(2, 0.5, side=16))
    assert [g.record["row_id"] for g in read_groups(tmp_path)] == ["row-1", "row-2"]


def test_an_equal_group_does_not_replace_an_earlier_one(tmp_path):
    store = GroupStore(tmp_path, keep=1)
    assert [store.offer(scored_group(i, 1.0, side=16)) for i in range(3)] == [True, False, False]


def test_a_group_comes_back_with_every_reward_text_and_picture(tmp_path):
    """Pitfall: a failed reward is never shown as a number, nor enters the mean that ranks the group."""
    scored = scored_group(3, 1.0, side=32, failed=3)
    assert GroupStore(tmp_path, keep=1).offer(scored)
    (group,) = read_groups(tmp_path)
    record = group.record
    assert record["mean_total"] == pytest.approx(float(scored.totals[:3].mean()))
    assert (record["row_id"], record["seed"], record["objects"]) == ("row-3", 103, ["cat", "cup"])
    first, second, _, last = record["samples"]
    assert first["texts"][2] == HOSTILE
    assert first["versions"] == [{"version": 3, "start": 0, "end": 25}, {"version": 4, "start": 25, "end": 40}]
    assert first["rewards"]["generation"]["detail"]["realism"] == 4.0
    assert first["rewards"]["understanding"]["kind"] == "absent"
    assert set(second["pictures"]) == {"coarse", "middle"} and second["errors"]
    assert last["total"] is None and not last["valid"]
    assert last["rewards"]["generation"] == {"kind": "failed", "reason": "the visual expert did not answer"}
    for stage, image in zip(("coarse", "middle", "final"), scored.group.samples[0].images, strict=True):
        np.testing.assert_array_equal(read_png(group.folder / first["pictures"][stage]), image)
    np.testing.assert_array_equal(read_png(group.folder / "lr.png"), scored.group.prompt.lr_image)


def test_a_group_without_any_reward_is_not_kept(tmp_path):
    assert not GroupStore(tmp_path, keep=1).offer(scored_group(0, 1.0, samples=1, side=16, failed=0))
    assert read_groups(tmp_path) == []


def test_an_evaluation_comes_back_with_pictures_of_the_first_prompts(tmp_path):
    run = RunDirectory.create(tmp_path, "toy", "")
    assert read_evaluation(run, "before") is None
    prompts = evaluated(3, 0.1, side=32)
    write_evaluation(run, "before", evaluated(1, 0.0, side=32), pictures=1)
    write_evaluation(run, "before", prompts, pictures=2)
    stored = read_evaluation(run, "before")
    assert [p["row_id"] for p in stored.prompts] == ["heldout-0", "heldout-1", "heldout-2"]
    assert stored.prompts[2]["components"]["understanding"] is None and stored.prompts[1]["psnr"] is None
    assert [set(p["pictures"]) for p in stored.prompts] == [
        {"lr", "hq", "coarse", "middle", "final"},
        {"lr", "hq", "coarse", "middle"},
        set(),
    ]
    np.testing.assert_array_equal(read_png(stored.folder / stored.prompts[0]["pictures"]["hq"]), prompts[0].hq)
