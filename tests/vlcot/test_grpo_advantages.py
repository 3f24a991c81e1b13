"""Group advantages. Numbers in the names are those of shared/pitfalls.md, part 1."""

import math

import numpy as np
import pytest
import torch

from tests.vlcot.grpo_oracle import oracle_advantages
from vlcot.grpo import AdvantageConfig, count_groups, group_advantages

pytestmark = pytest.mark.unit

NAN = math.nan


def advantages(rewards, groups=None, valid=None, **config):
    rewards = torch.tensor(rewards, dtype=torch.float64)
    groups = torch.zeros(len(rewards), dtype=torch.int64) if groups is None else torch.tensor(groups)
    valid = torch.ones(len(rewards), dtype=torch.bool) if valid is None else torch.tensor(valid)
    values, keep = group_advantages(rewards, valid, groups, AdvantageConfig(**config))
    assert values.dtype == torch.float32
    return values.tolist(), keep.tolist()


def test_pitfall_1_groups_are_made_by_id_alone():
    # Two groups whose prompts could be equal; ids neither sorted, contiguous nor positive.
    values, keep = advantages([1.0, 10.0, 0.0, 20.0], groups=[7, -3, 7, -3], eps=1e-12)
    assert values == pytest.approx([0.5**0.5, -(0.5**0.5), -(0.5**0.5), 0.5**0.5], abs=1e-6)
    assert keep == [True] * 4
    merged, _ = advantages([1.0, 10.0, 0.0, 20.0], groups=[7, 7, 7, 7], eps=1e-12)
    assert merged[0] < 0 < values[0]


def test_pitfall_2_a_lone_sample_is_dropped_and_counted_never_its_raw_reward():
    rewards, groups, valid = [3.0, 5.0, 1.0, 2.0], [0, 1, 1, 0], [True, True, True, False]
    values, keep = advantages(rewards, groups=groups, valid=valid)
    assert (values[0], keep[0]) == (0.0, False)
    assert keep == [False, True, True, False]
    counts = count_groups(
        torch.tensor(rewards, dtype=torch.float64), torch.tensor(valid), torch.tensor(groups), AdvantageConfig()
    )
    assert counts == (2, 1, 0, 1)


def test_pitfall_2_a_group_below_the_floor_is_dropped_whole():
    values, keep = advantages([1.0, 2.0, 1.0, 2.0, 3.0], groups=[0, 0, 1, 1, 1], min_group=3)
    assert keep == [False, False, True, True, True]
    assert values[:2] == [0.0, 0.0]
    with pytest.raises(ValueError, match="min_group is 1"):
        AdvantageConfig(min_group=1)


@pytest.mark.parametrize(
    ("std", "rewards", "expected"),
    [
        # mean 7/3, sum of squares 14/3: std 1.5275252 (n - 1) and 1.2472191 (n), each + 1e-4.
        ("unbiased", [1.0, 2.0, 4.0], [-0.8728145, -0.2182036, 1.0910181]),
        ("population", [1.0, 2.0, 4.0], [-1.0689593, -0.2672398, 1.3361992]),
        ("none", [1.0, 2.0, 4.0], [-1.3333333, -0.3333333, 1.6666667]),
        ("unbiased", [0.0, 1.0], [-0.7070068, 0.7070068]),
        ("population", [0.0, 1.0], [-0.9998000, 0.9998000]),
    ],
)
def test_pitfall_3_std_convention_in_literal_numbers(std, rewards, expected):
    assert advantages(rewards, std=std)[0] == pytest.approx(expected, abs=2e-7)


def test_pitfall_4_rewards_that_differ_by_1e_5_do_not_cancel():
    # std 7.0711e-6: with eps 1e-4 the advantage is 5e-6 / 1.070711e-4, with a tiny eps sqrt(1/2).
    assert advantages([1.00000, 1.00001])[0] == pytest.approx([-0.0466979, 0.0466979], abs=1e-6)
    assert advantages([1.00000, 1.00001], eps=1e-12)[0] == pytest.approx([-(0.5**0.5), 0.5**0.5], abs=1e-5)
    far, _ = advantages([1e6 + 1.00000, 1e6 + 1.00001], eps=1e-12)
    assert far == pytest.approx([-(0.5**0.5), 0.5**0.5], abs=1e-5)


@pytest.mark.parametrize("stand_in", [NAN, math.inf, 0.0, -1e9])
def test_pitfall_5_a_failed_score_enters_neither_mean_nor_std(stand_in):
    values, keep = advantages([1.0, stand_in, 2.0, 4.0], valid=[True, False, True, True])
    assert values == pytest.approx([-0.8728145, 0.0, -0.2182036, 1.0910181], abs=2e-7)
    assert keep == [True, False, True, True]


def test_pitfall_5_a_group_of_failures_is_dropped_without_nan():
    values, keep = advantages([NAN, NAN, 1.0, 2.0], groups=[0, 0, 1, 1], valid=[False, False, True, True])
    assert values[:2] == [0.0, 0.0] and keep == [False, False, True, True]


def test_pitfall_5_a_nan_that_claims_to_be_valid_is_refused():
    with pytest.raises(ValueError, match=r"samples \[1\] are not finite"):
        advantages([1.0, NAN, 2.0])


def test_pitfall_6_rows_keep_their_place_through_any_order_and_any_filter():
    rng = np.random.default_rng(6)
    rewards = rng.normal(size=24)
    groups = np.repeat(np.arange(6), 4)
    rewards[groups == 2] = 0.7
    valid = rng.random(24) < 0.8
    order = rng.permutation(24)
    for drop in (False, True):
        straight, keep = advantages(rewards.tolist(), groups.tolist(), valid.tolist(), drop_zero_variance=drop)
        mixed, mixed_keep = advantages(
            rewards[order].tolist(), groups[order].tolist(), valid[order].tolist(), drop_zero_variance=drop
        )
        assert mixed == pytest.approx([straight[i] for i in order], abs=1e-6)
        assert mixed_keep == [keep[i] for i in order]
        assert all(keep[i] == (valid[i] and not drop) for i in range(24) if groups[i] == 2)


def test_pitfall_6_a_constant_group_has_exactly_zero_advantage_and_may_be_dropped():
    # 0.1 * 3 / 3 is not 0.1 in binary: the rounding must not survive as an advantage.
    assert advantages([0.1, 0.1, 0.1], eps=1e-12) == ([0.0, 0.0, 0.0], [True, True, True])
    assert advantages([0.1, 0.1, 0.1], std="none") == ([0.0, 0.0, 0.0], [True, True, True])
    assert advantages([0.1, 0.1, 0.1], drop_zero_variance=True) == ([0.0, 0.0, 0.0], [False, False, False])
    # What a failed sample holds does not make its group vary.
    failed = {"valid": [True, True, True, False], "eps": 1e-12}
    assert advantages([0.1, 0.1, 0.1, 9.0], **failed) == ([0.0] * 4, failed["valid"])
    assert advantages([0.1, 0.1, 0.1, -9.0], **failed) == ([0.0] * 4, failed["valid"])


@pytest.mark.parametrize("std", ["unbiased", "population", "none"])
@pytest.mark.parametrize("seed", range(5))
def test_against_the_oracle(std, seed):
    rng = np.random.default_rng(seed)
    rewards = rng.choice([0.0, 0.25, 1.0, 3.7], size=40).tolist()
    valid, groups = (rng.random(40) < 0.7).tolist(), rng.integers(0, 9, size=40).tolist()
    values, keep = advantages(rewards, groups, valid, std=std, min_group=3)
    wanted, wanted_keep = oracle_advantages(rewards, valid, groups, std, 1e-4, 3)
    assert keep == wanted_keep
    assert values == pytest.approx(wanted, abs=1e-6)
    assert any(keep) and not all(keep)


def test_no_samples_at_all_is_no_error():
    empty = group_advantages(
        torch.zeros(0, dtype=torch.float64),
        torch.zeros(0, dtype=torch.bool),
        torch.zeros(0, dtype=torch.int64),
        AdvantageConfig(),
    )
    assert [part.numel() for part in empty] == [0, 0]


def test_wrong_types_and_settings_are_named():
    good = torch.zeros(2, dtype=torch.float64), torch.ones(2, dtype=torch.bool), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"rewards is torch.float32"):
        group_advantages(good[0].float(), good[1], good[2], AdvantageConfig())
    with pytest.raises(ValueError, match=r"group_ids is torch.int64 of shape \[1\]"):
        group_advantages(good[0], good[1], good[2][:1], AdvantageConfig())
    with pytest.raises(ValueError, match="std 'sample' is unknown"):
        AdvantageConfig(std="sample")
    with pytest.raises(ValueError, match="eps is 0"):
        AdvantageConfig(eps=0.0)
