"""Overlap arithmetic behind ``idle/*`` and ``reward_hidden``."""

from __future__ import annotations

import pytest

from rl_system.coordination.meter import covered, hidden_share

pytestmark = pytest.mark.unit


def test_overlapping_intervals_are_counted_once_and_cut_to_the_window():
    assert covered((10, 20), [(0, 12), (11, 13), (15, 16), (19, 30)]) == pytest.approx(3 + 1 + 1)


def test_nothing_open_covers_nothing():
    assert covered((10, 20), []) == 0.0
    assert covered((10, 20), [(0, 10), (20, 25)]) == 0.0


def test_reward_time_is_hidden_where_generation_goes_on():
    assert hidden_share([(0, 4), (6, 8)], [(2, 7)]) == pytest.approx((2 + 1) / 6)
    assert hidden_share([], [(0, 1)]) == 1.0
