"""The summary's figures against independent computations."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from rl_system.runs.directory import RunDirectory
from rl_system.runs.summary import build_summary, paired_bootstrap_ci, write_summary
from tests.rl_system.runs.synthetic import evaluated

pytestmark = pytest.mark.unit

FACTS = {
    "seed": 0,
    "kl_final": 0.01,
    "steps": 20,
    "groups_trained": 80,
    "groups_reused": 0,
    "wall_s": 300.0,
    "max_staleness_seen": 1,
    "engines": {"ray": "2.60.0"},
    "weight_checksum_match": True,
}


def test_the_interval_is_that_of_means_of_resampled_prompts():
    """Two prompts with gains 0 and 1: a resampled mean is 0, 1/2 or 1 with probability 1/4, 1/2, 1/4."""
    assert paired_bootstrap_ci([3.0, 5.0], [3.0, 6.0], seed=0) == (0.5, 0.0, 1.0)
    assert paired_bootstrap_ci([3.0, 5.0], [3.0, 6.0], seed=0, level=0.4) == (0.5, 0.5, 0.5)


def test_the_interval_agrees_with_the_normal_approximation_on_many_prompts():
    rng = np.random.default_rng(0)
    before = rng.normal(1.0, 2.0, 400)  # spread between prompts, which pairing removes
    gains = rng.normal(0.3, 0.5, 400)
    gain, low, high = paired_bootstrap_ci(before, before + gains, seed=1)
    half = 1.959964 * gains.std() / math.sqrt(400)
    assert gain == pytest.approx(gains.mean(), abs=1e-12)
    assert (low, high) == pytest.approx((gains.mean() - half, gains.mean() + half), abs=0.05 * half)
    assert paired_bootstrap_ci(before, before + gains, seed=1) == (gain, low, high)


@pytest.mark.parametrize(("before", "after"), [([1.0], [1.0, 2.0]), ([], []), ([1.0, math.nan], [1.0, 2.0])])
def test_an_interval_that_means_nothing_is_refused(before, after):
    with pytest.raises(ValueError):
        paired_bootstrap_ci(before, after, seed=0)


def test_the_summary_holds_what_was_asked_for():
    before, after = evaluated(6, 0.0, side=32), evaluated(6, 0.2, side=32)
    summary = build_summary(before, after, **FACTS)
    assert set(summary) == {
        *("reward_before", "reward_after", "reward_gain", "reward_gain_ci95", "rewards_before", "rewards_after"),
        *("psnr_before", "psnr_after", "ssim_before", "ssim_after", "prompts", "kl_final", "steps"),
        *("groups_trained", "groups_reused", "wall_s", "max_staleness_seen", "engines", "weight_checksum_match"),
    }
    # gains 0.2 * (1 + 0.1 * (0, 1, 2, 3, 4, 0)), their mean is 0.2 * (1 + 1/6)
    assert summary["reward_gain"] == pytest.approx(0.2 * (1 + 1 / 6))
    assert summary["reward_after"] - summary["reward_before"] == pytest.approx(summary["reward_gain"])
    low, high = summary["reward_gain_ci95"]
    assert 0.2 < low < summary["reward_gain"] < high < 0.28
    assert summary["rewards_before"] == pytest.approx(
        {"format": 0.9, "degradation": 0.5, "understanding": 0.4, "generation": 0.3}
    )
    assert summary["rewards_after"]["understanding"] == pytest.approx(0.6)


def test_psnr_is_compared_on_prompts_that_have_a_final_image_both_times():
    before, after = evaluated(4, 0.0, side=32), evaluated(4, 0.2, side=32)
    after[3] = replace(after[3], psnr=None, ssim=None)  # prompt 1 has none either
    summary = build_summary(before, after, **FACTS)
    assert summary["psnr_before"] == pytest.approx((20.0 + 20.5) / 2)
    assert summary["psnr_after"] == pytest.approx((20.0 + 20.5) / 2 + 0.2)


def test_evaluations_of_different_prompts_are_refused():
    prompts = evaluated(3, 0.0, side=32)
    with pytest.raises(ValueError, match="same prompts"):
        build_summary(prompts, prompts[::-1], **FACTS)


def test_a_figure_that_is_not_finite_is_refused_by_name_and_nothing_is_written(tmp_path):
    prompts = evaluated(2, 0.0, side=32)
    with pytest.raises(ValueError, match="kl_final is nan"):
        build_summary(prompts, prompts, **(FACTS | {"kl_final": math.nan}))
    run = RunDirectory.create(tmp_path, "toy", "")
    summary = build_summary(prompts, prompts, **FACTS)
    with pytest.raises(ValueError, match=r"rewards_after\.format is inf"):
        write_summary(run, summary | {"rewards_after": {"format": math.inf}})
    assert not run.summary.exists()
    write_summary(run, summary)
    assert json.loads(run.summary.read_text()) == summary
