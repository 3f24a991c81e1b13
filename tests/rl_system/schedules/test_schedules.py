"""Invariants I1, I2, I3 and I6 of the design over random schedules of delays, deaths and failures.

``SCHEDULES=20000`` plays so many instead of the few hundred of the unit suite.
"""

from __future__ import annotations

import asyncio
import os
from dataclasses import replace
from random import Random
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, Phase, given, note, settings
from hypothesis import strategies as st

from actors.weight_store import WeightStore
from reward_servers.policies import FailFast, MinViableGroup, RetryThenDrop, RewardFailure
from rl_system.coordination.coordinator import CLOSE_S, StalledError
from rl_system.coordination.ledger import GroupState
from tests.rl_system.schedules.loop import simulate
from tests.rl_system.schedules.play import Played, play
from tests.rl_system.schedules.processes import SimulatedActor, SimulatedPool, push
from tests.rl_system.schedules.rewards import prompt
from tests.rl_system.schedules.schedule import STALL_TIMEOUT_S, Damage, End, Hang, Pace, Schedule

pytestmark = pytest.mark.unit

WANTED = os.environ.get("SCHEDULES")


def schedules(count: int):
    """Settings of a property that is tried on ``count`` schedules, the same ones every time."""
    return settings(
        max_examples=count if WANTED is None else int(WANTED),
        derandomize=WANTED is None,
        database=None,
        deadline=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )


def times(most: int, until: float = 30.0):
    return st.lists(st.floats(0, until), max_size=most).map(tuple)


PACES = st.builds(
    Pace,
    generate=st.sampled_from([0.0, 1.0, 6.0]),
    score=st.sampled_from([0.0, 1.0, 6.0]),
    train=st.sampled_from([0.0, 1.0, 6.0]),
    push=st.sampled_from([0.0, 0.5, 3.0]),
    call=st.sampled_from([0.0, 0.01, 0.5]),
    write=st.sampled_from([0.0, 0.5, 6.0]),
    restart=st.sampled_from([0.0, 1.0, 6.0]),
)
CALM = st.builds(
    Schedule,
    seed=st.integers(0, 2**32),
    groups_per_step=st.integers(1, 3),
    max_staleness=st.integers(0, 2),
    steps=st.integers(1, 5),
    actors=st.integers(1, 3),
    group_size=st.integers(2, 5),
    checkpoint_every=st.integers(1, 3),
    policy=st.sampled_from([MinViableGroup(0.75), MinViableGroup(0.5), RetryThenDrop(1)]),
    pace=PACES,
)
DEATHS = {
    "actor_deaths": times(3),
    "engine_deaths": times(2),
    "learner_deaths": times(3),
    "driver_ends": st.lists(st.tuples(st.floats(0, 20), st.sampled_from(End)), max_size=2).map(tuple),
    "damages": st.lists(st.sampled_from([None, *Damage]), max_size=2).map(tuple),
}
FAILURES = {
    "undetected": st.frozensets(st.integers(0, 8), max_size=2),
    "unjudged": st.frozensets(st.integers(0, 8), max_size=2),
    "failure_rate": st.sampled_from([0.0, 0.05, 0.2]),
    "outages": st.lists(st.tuples(st.floats(0, 20), st.floats(0, 10)), max_size=1).map(tuple),
}


def varied(base, **parts):
    """``base`` with these attributes drawn too."""
    return st.tuples(base, st.fixed_dictionaries(parts)).map(lambda drawn: replace(drawn[0], **drawn[1]))


def noted(schedule: Schedule) -> Played:
    """Play it; a failure shows it."""
    note(str(schedule))
    return play(schedule)


def check_accounts(schedule: Schedule, played: Played) -> None:
    """I2: every admitted row was trained exactly once, or dropped for a reason."""
    trained = [row for step in sorted(played.trained) for row in played.trained[step]]
    dropped = played.ledger.dropped_rows()
    assert sorted(played.trained) == list(range(1, schedule.steps + 1))
    assert len(trained) == schedule.steps * schedule.groups_per_step
    assert played.ledger.trained_rows() == [f"row-{row}" for row in trained]
    assert sorted([*played.ledger.trained_rows(), *dropped]) == sorted(f"row-{row}" for row in range(played.taken))
    assert all("samples have no reward: " in reason for reason in dropped.values())
    assert [row for record in played.journal for row in record.rows] == trained
    recorded = [row for record in played.journal for row in (*record.rows, *record.dropped)]
    assert sorted(recorded) == list(range(played.journal[-1].admitted))


@schedules(120)
@given(varied(CALM, **DEATHS))
def test_whatever_dies_the_rows_trained_are_those_of_an_undisturbed_run(schedule):
    """I1 and I3 are checked by the learner in every step of every schedule (``learner.py``)."""
    played = noted(schedule)
    assert played.error is None
    check_accounts(schedule, played)
    rows = range(schedule.steps * schedule.groups_per_step)
    assert sorted(row for step in played.trained.values() for row in step) == list(rows)
    assert not played.ledger.dropped_rows()


@schedules(120)
@given(varied(CALM, **DEATHS, **FAILURES))
def test_whatever_fails_every_row_is_trained_once_or_dropped_for_a_reason(schedule):
    played = noted(schedule)
    assert played.error is None
    check_accounts(schedule, played)
    assert {f"row-{row}" for row in schedule.undetected if row < played.taken} <= set(played.ledger.dropped_rows())


SLOW = Pace(generate=6.0, train=6.0)


@pytest.mark.parametrize("how", list(End))
@pytest.mark.parametrize("max_staleness", [0, 1, 2])
def test_groups_that_were_ready_are_used_by_the_next_driver(how, max_staleness):
    """In the random schedules too (``play.py`` says which must be); here it is seen that it happens."""
    played = [
        play(Schedule(seed, steps=4, max_staleness=max_staleness, driver_ends=((2.0 + seed, how),), pace=SLOW))
        for seed in range(6)
    ]
    assert all(run.error is None and run.drivers <= 2 for run in played)
    assert sum(run.reused for run in played) >= 2


@schedules(50)
@given(varied(CALM, **FAILURES, policy=st.just(FailFast())))
def test_a_run_that_tolerates_no_failure_ends_at_the_first_or_trains_everything(schedule):
    played = noted(schedule)
    if played.error is None:
        check_accounts(schedule, played)
        assert not played.ledger.dropped_rows()
    else:
        assert isinstance(played.error, RewardFailure) and schedule.rewards_fail and played.failed_rows


NAMED = {
    Hang.ALL_ACTORS: ("generating (oldest for ",),
    Hang.ONE_ACTOR: ("generating (oldest for ",),
    Hang.RESTARTS: ("generating (oldest for ",),
    Hang.SERVERS: ("scoring (oldest for ", "gave no answer within", "Left alone after failures: "),
    Hang.PATIENT_SERVERS: ("scoring (oldest for ",),
    Hang.LEARNER: ("The learner trains step ",),
    Hang.QUEUE: ("The learner trains step ", "the experience queue has not "),
}
HANGS = {"hang": st.sampled_from(list(NAMED)), "hang_at": st.floats(0, 20)}
LATEST_S = {hang: 4.5 + (CLOSE_S if hang is Hang.QUEUE else 0.0) for hang in NAMED}
"""After the stall timeout: the coordinator looks once a second, and calls and replies take up to half a second."""


@schedules(80)
@given(
    varied(
        CALM,
        hang=st.sampled_from(list(NAMED)),
        hang_at=st.floats(0, 20),
        actor_deaths=times(2),
        learner_deaths=times(2),
    )
)
def test_whatever_hangs_the_run_ends_in_time_and_says_who_is_waited_for(schedule):
    played = noted(schedule)
    if played.error is None:  # it was over before
        assert played.ledger.count(GroupState.TRAINED) == schedule.steps * schedule.groups_per_step
        return
    assert isinstance(played.error, StalledError), played.error
    assert any(part in str(played.error) for part in NAMED[schedule.hang]), played.error
    late = played.ended - played.last_progress - STALL_TIMEOUT_S
    assert late < LATEST_S[schedule.hang], f"{late} s after the time"
    assert late > -0.5 or "the experience queue" in str(played.error), f"{-late} s before the time"


def test_restarts_of_idle_actors_are_no_fault_of_the_next_prompt():
    """All of them have only the weights on disk when it comes; it may fail on none."""

    async def story():
        schedule, store = Schedule(seed=0, actors=4), WeightStore()
        actors = [SimulatedActor(index, schedule, Random(0)) for index in range(4)]
        pool = SimulatedPool(actors, store, deaths=0, delay=lambda: 0.0)
        await push(1, actors, store, schedule, Random(0))
        for actor in actors:
            actor.die()
        await asyncio.sleep(schedule.pace.restart)
        return await pool.generate(prompt(0))

    group = simulate(story(), limit_s=60)
    assert {span.version for sample in group.samples for span in sample.versions} == {1}


def test_an_engine_that_dies_while_its_actor_catches_up_is_started_again():
    async def story():
        schedule, store = Schedule(seed=0, pace=Pace(generate=3.0, push=2.0, restart=1.0)), WeightStore()
        slowest = SimpleNamespace(uniform=lambda _, longest: longest)
        actor = SimulatedActor(0, schedule, slowest)
        pool = SimulatedPool([actor], store, deaths=2, delay=lambda: 0.0)
        await push(1, [actor], store, schedule, slowest)
        actor.die()
        group = asyncio.create_task(pool.generate(prompt(0)))
        await asyncio.sleep(2.0)  # it catches up from about 1 s to 3 s
        actor.lose_engine()
        return await group

    group = simulate(story(), limit_s=60)
    assert {span.version for sample in group.samples for span in sample.versions} == {1}
