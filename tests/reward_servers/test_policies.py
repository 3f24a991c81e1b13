"""What becomes of groups in which rewards failed."""

from dataclasses import replace

import numpy as np
import pytest

from reward_servers.policies import FailFast, MinViableGroup, RetryThenDrop, RewardFailure, Verdict, failure_reasons
from tests.rl_system.runs.synthetic import scored_group
from vlcot.groups import Failed, Scored

pytestmark = pytest.mark.unit


def group(*failed: bool):
    """A scored group; sample i has no reward where ``failed[i]``."""
    whole = scored_group(0, 1.0)
    scores = tuple(
        {"format": Scored(1.0), "generation": Failed("qwen_vl is down") if f else Scored(0.5)} for f in failed
    )
    totals = np.array([np.nan if f else 1.5 for f in failed])
    return replace(whole, scores=scores, totals=totals, valid=~np.array(failed))


def test_fail_fast_ends_with_the_group_and_the_reason():
    assert FailFast().verdict(group(False, False), 1) is Verdict.TRAIN
    with pytest.raises(RewardFailure, match="1 of 2 samples have no reward: generation: qwen_vl is down"):
        FailFast().verdict(group(False, True), 1)


def test_retry_then_drop_scores_again_as_often_as_allowed():
    policy = RetryThenDrop(2)
    assert policy.verdict(group(False, False), 1) is Verdict.TRAIN
    broken = group(False, True)
    assert [policy.verdict(broken, n) for n in (1, 2, 3)] == [Verdict.SCORE_AGAIN, Verdict.SCORE_AGAIN, Verdict.DROP]
    assert RetryThenDrop(0).verdict(broken, 1) is Verdict.DROP


@pytest.mark.parametrize(
    ("floor", "valid", "size", "verdict"),
    [
        (0.75, 3, 4, Verdict.TRAIN),
        (0.75, 2, 4, Verdict.DROP),
        (0.75, 3, 3, Verdict.TRAIN),
        (0.75, 2, 3, Verdict.DROP),
        (0.0, 2, 8, Verdict.TRAIN),
        (0.0, 1, 8, Verdict.DROP),
        (1.0, 7, 8, Verdict.DROP),
    ],
)
def test_min_viable_group_needs_its_share_and_never_fewer_than_two(floor, valid, size, verdict):
    assert MinViableGroup(floor).verdict(group(*[i >= valid for i in range(size)]), 1) is verdict


def test_reasons_are_counted_and_a_whole_group_has_none():
    assert failure_reasons(group(False, False)) == ""
    assert failure_reasons(group(True, True, False)) == (
        "2 of 3 samples have no reward: generation: qwen_vl is down (2)"
    )


def test_impossible_settings_are_refused():
    for make in (lambda: RetryThenDrop(-1), lambda: MinViableGroup(1.5), lambda: MinViableGroup(float("nan"))):
        with pytest.raises(ValueError):
            make()
