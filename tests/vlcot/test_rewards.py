"""The four rewards and their sum."""

from __future__ import annotations

import math

import pytest

from vlcot.groups import Absent, Failed, Scored
from vlcot.rewards import (
    METRIC_EXPERTS,
    METRIC_RANGES,
    ExpertWeights,
    RewardWeights,
    degradation_reward,
    format_reward,
    generation_reward,
    metrics_reward,
    total_reward,
    understanding_reward,
)
from vlcot.sequence import ParsedChain

pytestmark = pytest.mark.unit

TRUTH = (
    "[medium blur, heavy downscale, light gaussian noise, heavy compression; "
    "no blur, upscale, medium poisson noise, light compression]"
)


def chain(degradation: str | None = None, errors: tuple[str, ...] = ()) -> ParsedChain:
    return ParsedChain(degradation, None, None, None, (None, None, None), errors)


def understanding(text: str | None, *objects: str) -> float:
    score = understanding_reward(text, objects)
    assert isinstance(score, Scored)
    return score.value


def test_format_is_one_or_zero_and_says_why() -> None:
    assert format_reward(chain()).value == 1.0
    wrong = format_reward(chain(errors=("an image is incomplete",)))
    assert wrong.value == 0.0 and wrong.detail["errors"] == ["an image is incomplete"]


def test_degradation_is_the_share_of_right_components() -> None:
    assert degradation_reward(chain(TRUTH), TRUTH).value == 1.0
    assert degradation_reward(chain(TRUTH.replace("medium", "light")), TRUTH).value == 6 / 8
    assert degradation_reward(chain("[medium blur]"), TRUTH).value == 1 / 8


def test_a_chain_without_degradation_text_has_every_component_wrong() -> None:
    assert degradation_reward(chain(None), TRUTH).value == 0.0


def test_objects_count_on_word_boundaries_only() -> None:
    assert understanding("a category of scattered things", "cat") == 0.0
    assert understanding("a bobcat", "cat") == 0.0
    assert understanding("A cat, asleep", "cat") == 1.0
    assert understanding("(cat)", "cat") == 1.0
    assert understanding("a red-cat", "cat") == 1.0


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("two cats", "cat"),
        ("old boxes", "box"),
        ("many galaxies", "galaxy"),
        ("three men", "man"),
        ("green leaves", "leaf"),
        ("sharp knives", "knife"),
        ("two traffic lights", "traffic light"),
        ("toys", "toy"),
    ],
)
def test_simple_plurals_count(text: str, name: str) -> None:
    assert understanding(text, name) == 1.0


def test_the_value_is_the_share_of_distinct_objects() -> None:
    assert understanding("a cup and a spoon", "cup", "spoon", "table") == pytest.approx(2 / 3)
    assert understanding("a cup", "cup", "Cup ", "cup") == 1.0
    score = understanding_reward("a cup", ["cup", "spoon"])
    assert isinstance(score, Scored) and score.detail == {"objects": ["cup", "spoon"], "named": ["cup"]}


def test_names_are_matched_literally() -> None:
    assert understanding("a cat", "c.t") == 0.0


def test_no_objects_means_absent_not_zero() -> None:
    assert isinstance(understanding_reward("a cat", []), Absent)
    assert isinstance(understanding_reward("a cat", [" "]), Absent)


def test_a_missing_coarse_text_names_nothing() -> None:
    assert understanding(None, "cat") == 0.0


def test_generation_is_the_weighted_sum_on_a_unit_scale() -> None:
    scores = {"quality": 10.0, "realism": 5.0, "consistency": 0.0}
    assert generation_reward(scores, ExpertWeights(0.5, 0.3, 0.2)).value == pytest.approx(0.65)


def test_expert_weights_must_sum_to_one_and_not_be_negative() -> None:
    for wrong in ((0.5, 0.5, 0.5), (1.5, -0.25, -0.25)):
        with pytest.raises(ValueError, match="sum to 1"):
            ExpertWeights(*wrong)


@pytest.mark.parametrize("value", [math.nan, math.inf, -0.1, 1.1])
def test_a_number_that_is_no_reward_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        Scored(value)
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        generation_reward({"quality": value * 10, "realism": value * 10, "consistency": value * 10}, ExpertWeights())


def test_total_adds_what_is_present_by_weight() -> None:
    scores = {"format": Scored(1.0), "degradation": Scored(0.5), "understanding": Absent("no object")}
    assert total_reward(scores, RewardWeights()) == 1.5
    assert total_reward(scores, RewardWeights(format=0.0, degradation=2.0)) == 1.0


def test_a_failed_component_leaves_no_total() -> None:
    assert total_reward({"format": Scored(1.0), "generation": Failed("timeout")}, RewardWeights()) is None


def test_metrics_become_a_reward_by_their_ranges() -> None:
    score = metrics_reward({"LPIPS": 0.25, "DISTS": 0.5, "PSNR": 25.0, "SSIM": 0.75})
    assert score.value == pytest.approx((0.75 + 0.5 + 0.5 + 0.75) / 4)
    assert score.detail == {"LPIPS": 0.25, "DISTS": 0.5, "PSNR": 25.0, "SSIM": 0.75}


def test_the_generative_expert_is_the_reward_of_the_authors_code() -> None:
    values = {"MUSIQ": 61.4, "MANIQA": 0.63, "CLIPIQA": 0.67, "TOPIQ": 0.71}
    theirs = (values["TOPIQ"] + values["MUSIQ"] / 100 + values["MANIQA"] + values["CLIPIQA"]) / 4
    assert tuple(values) == METRIC_EXPERTS["generative"]
    assert metrics_reward(values).value == pytest.approx(theirs)


@pytest.mark.parametrize(
    ("name", "value", "reward"), [("PSNR", 80.0, 1.0), ("LPIPS", 1.2, 0.0), ("MANIQA", -0.01, 0.0)]
)
def test_a_metric_outside_its_range_is_cut_off(name: str, value: float, reward: float) -> None:
    assert metrics_reward({name: value}).value == reward


def test_every_metric_of_an_expert_has_a_range_in_its_own_direction() -> None:
    from vlcot.metrics import METRICS

    assert {name for names in METRIC_EXPERTS.values() for name in names} == set(METRIC_RANGES)
    for name, (worst, best) in METRIC_RANGES.items():
        assert (best < worst) == METRICS[name].lower_is_better, name


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_metric_that_is_not_finite_is_no_reward(value: float) -> None:
    """Cutting off alone would make 0 or 1 of it."""
    with pytest.raises(ValueError, match=r"PSNR is .*finite"):
        metrics_reward({"SSIM": 0.5, "PSNR": value})


def test_metrics_without_a_range_and_no_metrics_at_all_are_refused() -> None:
    with pytest.raises(ValueError, match="NIQE has no range"):
        metrics_reward({"NIQE": 5.0})
    with pytest.raises(ValueError, match="at least one metric"):
        metrics_reward({})
