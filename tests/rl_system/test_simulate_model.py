"""The discrete-event model against arithmetic that can be done by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from rl_system.studies.scaling.events import Clock, Cores, Engine, EngineCost
from rl_system.studies.scaling.pipeline import LearnerCost, Pipeline, simulate, steady

pytestmark = pytest.mark.unit

PIPELINE = Pipeline(
    groups_per_step=4,
    max_staleness=0,
    group_size=2,
    tokens=100,
    tokens_std=0,
    rollout=EngineCost(0.01, 0.005, 64),
    detector=EngineCost(0.1, 0, 1),
    expert=EngineCost(0.2, 0.1, 8),
    learner=LearnerCost(fixed_s=0.5, group_s=0.25, push_s=0.2, load_s=0.1),
)


def _ends(cost: EngineCost, *jobs: float, cores: float | None = None, others: int = 0) -> list[float]:
    """When jobs that arrive together end, beside ``others`` more engines of the same cost with one endless job."""
    clock, ends = Clock(), []
    machine = Cores(cores)
    engine = Engine(cost, clock, machine)
    for _ in range(others):
        Engine(cost, clock, machine).submit(lambda: None, 1e9)
    for job in jobs:
        engine.submit(lambda: ends.append(clock.now), job)
    clock.after(1e6, clock.stop)
    clock.run()
    return ends


def test_jobs_that_run_together_are_equally_fast_and_faster_once_one_has_ended():
    # 0.3 s a unit until the shorter is done at 3 s; then the other's last ten units at 0.2 s
    assert _ends(EngineCost(0.1, 0.1, 8), 10, 20) == pytest.approx([3.0, 5.0])


def test_jobs_above_the_limit_wait_in_order_of_arrival():
    assert _ends(EngineCost(1.0, 0.0, 2), 3, 5, 1, 1) == pytest.approx([3, 4, 5, 5])


def test_engines_share_cores_only_when_they_want_more_than_there_are():
    cost = EngineCost(1.0, 0.0, 1, threads=2)
    assert _ends(cost, 4, cores=2) == pytest.approx([4])
    assert _ends(cost, 4, cores=2, others=1) == pytest.approx([8])
    assert _ends(cost, 4, cores=4, others=1) == pytest.approx([4])
    assert _ends(cost, 4, cores=None, others=3) == pytest.approx([4])


def test_a_pause_moves_the_end_and_is_not_busy_time():
    clock, ends = Clock(), []
    engine = Engine(EngineCost(1.0, 0.0, 1), clock, Cores(None))
    engine.submit(lambda: ends.append(clock.now), 4)
    clock.after(1.0, lambda: engine.pause(True))
    clock.after(3.5, lambda: engine.pause(False))
    clock.run()
    engine.settle()
    assert ends == pytest.approx([6.5])
    assert engine.busy_s == pytest.approx(4)


def test_a_synchronous_step_is_the_sum_of_its_stages():
    pipeline = replace(PIPELINE, admit_s=0.01, collect_s=0.02)
    generation = 100 * (0.01 + 8 * 0.005)  # eight chains together; the driver starts them 10 ms apart
    expert = 0.2 + 4 * 0.1
    train = 0.5 + 4 * 0.25
    step = generation + expert + train + 0.2 + 0.1
    driver = 4 * (0.01 + 0.02)
    assert step < simulate(pipeline, 6).step_s < step + driver
    outcome = simulate(PIPELINE, 6)
    assert outcome.step_s == pytest.approx(step)
    assert outcome.generation_s == pytest.approx(generation)
    assert outcome.reward_s == pytest.approx(expert)
    assert (outcome.train_s, outcome.push_s) == pytest.approx((train, 0.3))
    assert outcome.busy["learner"] == pytest.approx((train + 0.2) / step)


def test_the_images_of_a_group_are_decoded_one_group_after_the_other():
    decoded = replace(PIPELINE, decoder=EngineCost(0.4, 0, 1))
    # the four groups end together, queue for the decoder, and the expert starts on them 0.4 s apart: 0.3 s each alone
    assert simulate(decoded, 6).step_s == pytest.approx(simulate(PIPELINE, 6).step_s - 0.6 + 4 * 0.4 + 0.3)


@pytest.mark.parametrize("staleness", [0, 1, 2, 3])
def test_batches_follow_the_slots_and_the_order_of_admission(staleness):
    """An oracle without events: chains do not slow each other down, rewards take no time."""
    steps, g, train = 12, 3, 40.0
    pipeline = replace(
        PIPELINE,
        groups_per_step=g,
        max_staleness=staleness,
        tokens_std=30,
        rollout=EngineCost(1.0, 0.0, 1000),
        detector=EngineCost(1e-9, 0, 1),
        expert=EngineCost(1e-9, 0, 1000),
        learner=LearnerCost(train, 0, 0, 0),
    )
    lengths = np.maximum(np.random.default_rng(5).normal(100, 30, (steps * g, 2)), 1).max(axis=1).reshape(steps, g)
    ends: list[float] = []
    for step in range(steps):
        admitted = ends[step - staleness - 1] if step > staleness else 0.0
        ready = admitted + lengths[step].max()
        ends.append(max(ready, ends[-1] if ends else 0.0) + train)
    assert simulate(pipeline, steps, seed=5).step_ends == pytest.approx(ends, abs=1e-4)


def test_with_slots_enough_the_slowest_stage_alone_sets_the_pace():
    slow_learner = replace(PIPELINE, max_staleness=6, learner=LearnerCost(10, 0, 0.2, 0.1))
    assert steady(slow_learner).step_s == pytest.approx(10.3, rel=1e-3)
    assert steady(slow_learner).busy["learner"] == pytest.approx(10.2 / 10.3, rel=1e-3)
    slow_rollout = replace(PIPELINE, max_staleness=6, rollout=EngineCost(0.1, 0.0, 2), replicas=(2, 1, 1))
    # a group takes 10 s of one of two actors; generation stands still for 0.1 s a step
    assert steady(slow_rollout).step_s == pytest.approx(4 * 10 / 2 + 0.1, rel=1e-2)
    slow_expert = replace(PIPELINE, max_staleness=6, expert=EngineCost(8, 0, 1), replicas=(1, 1, 2))
    assert steady(slow_expert).step_s == pytest.approx(4 * 8 / 2, rel=1e-2)
    slow_driver = replace(PIPELINE, max_staleness=6, admit_s=2.0, collect_s=1.0)
    assert steady(slow_driver).step_s == pytest.approx(4 * 3, rel=2e-2)


def test_a_run_starts_no_more_groups_than_it_trains():
    late = simulate(PIPELINE, 4, learner_start_s=100)
    assert late.step_ends[0] == pytest.approx(100 + 1.5 + 0.3)
    eager = replace(PIPELINE, max_staleness=3)
    # all four batches are admitted at once and wait for the learner: the steps are its own
    assert simulate(eager, 4, learner_start_s=100).step_s == pytest.approx(1.8)


def test_what_cannot_be_simulated_is_refused():
    with pytest.raises(ValueError, match="at least one must remain"):
        simulate(PIPELINE, 3, skip=3)
    with pytest.raises(ValueError, match="must be positive"):
        replace(PIPELINE, replicas=(1, 0, 1))
    with pytest.raises(ValueError, match="max_staleness=-1"):
        replace(PIPELINE, max_staleness=-1)
    with pytest.raises(ValueError, match="concurrent=0"):
        EngineCost(1.0, 0.0, 0)
    with pytest.raises(ValueError, match="equal to 0"):
        EngineCost(0.0, 0.0, 1)


def test_a_delayed_reward_lengthens_a_synchronous_step_and_hides_behind_an_asynchronous_one():
    base = simulate(PIPELINE, 6)
    delayed = replace(PIPELINE, delay_s=2.0)
    assert simulate(delayed, 6).step_s == pytest.approx(base.step_s - 0.6 + 2.0)  # the expert's 0.6 s are part of it
    slow_learner = replace(delayed, max_staleness=3, learner=LearnerCost(9, 0, 0.2, 0.1))
    assert steady(slow_learner).step_s == pytest.approx(9.3, rel=1e-3)
