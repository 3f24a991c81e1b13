"""Overlap arithmetic behind ``idle/*`` and ``reward_hidden``."""

from __future__ import annotations

import pytest

from rl_system.coordination import meter as meter_module
from rl_system.coordination.meter import PipelineMeter, covered, hidden_share
from tests.rl_system.runs.synthetic import scored_group

pytestmark = pytest.mark.unit


def test_overlapping_intervals_are_counted_once_and_cut_to_the_window():
    assert covered((10, 20), [(0, 12), (11, 13), (15, 16), (19, 30)]) == pytest.approx(3 + 1 + 1)


def test_nothing_open_covers_nothing():
    assert covered((10, 20), []) == 0.0
    assert covered((10, 20), [(0, 10), (20, 25)]) == 0.0


def test_reward_time_is_hidden_where_generation_goes_on():
    assert hidden_share([(0, 4), (6, 8)], [(2, 7)]) == pytest.approx((2 + 1) / 6)
    assert hidden_share([], [(0, 1)]) == 1.0


def test_a_generation_that_goes_on_over_the_end_of_a_step_counts_in_both(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(meter_module.time, "time", lambda: clock[0])
    meter, batch = PipelineMeter(), [scored_group(1, 1.0)]
    clock[0] = 101.0
    meter.generating("long")
    meter.reward(102.0, 104.0)
    clock[0] = 110.0
    first = meter.step({}, batch)
    clock[0] = 116.0
    meter.generation("long", 101.0, 116.0)
    meter.reward(115.0, 117.0)
    clock[0] = 120.0
    second = meter.step({}, batch)
    assert (first["idle/actors"], first["reward_hidden"]) == pytest.approx((0.1, 1.0))
    assert (second["idle/actors"], second["reward_hidden"]) == pytest.approx((0.4, 0.5))
