"""Ledger invariants I1 (staleness) and I2 (exactly once) under random schedules."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rl_system.coordination.ledger import BatchRecord, GroupState, Ledger

pytestmark = pytest.mark.unit


@settings(max_examples=100, deadline=None)
@given(
    groups_per_step=st.integers(1, 4),
    max_staleness=st.integers(0, 3),
    steps=st.integers(1, 6),
    choices=st.lists(st.integers(0, 10_000), min_size=400, max_size=400),
)
def test_no_group_is_trained_staler_than_the_bound_whatever_the_order_of_events(
    groups_per_step, max_staleness, steps, choices
):
    """Pitfall 23: soft or off-by-one bounds. Groups finish in any order, some are dropped."""
    ledger = Ledger(groups_per_step, max_staleness, steps * groups_per_step)
    version, admitted_at, rows = 0, {}, 0
    pending: list[int] = []
    training: list[int] | None = None
    for choice in choices:
        actions = []
        if ledger.may_admit():
            actions.append("admit")
        if pending:
            actions += ["finish", "drop"] if choice % 7 == 0 else ["finish"]
        if training is None and ledger.next_batch() is not None:
            actions.append("take")
        if training is not None:
            actions.append("push")
        if not actions:
            break
        action = actions[choice % len(actions)]
        if action == "admit":
            order = ledger.admit(f"row-{rows}", 0.0)
            rows += 1
            admitted_at[order] = version
            ledger.move(order, GroupState.GENERATING, 0.0)
            ledger.move(order, GroupState.SCORING, 0.0)
            pending.append(order)
        elif action in ("finish", "drop"):
            order = pending.pop(choice % len(pending))
            ledger.move(order, GroupState.READY if action == "finish" else GroupState.DROPPED, 0.0, "chance")
        elif action == "take":
            training = ledger.next_batch()
            assert len(training) == groups_per_step
            assert all(version - admitted_at[order] <= max_staleness for order in training)
        else:
            for order in training:
                ledger.move(order, GroupState.TRAINED, 0.0)
            training, version = None, version + 1
    trained, dropped = ledger.trained_rows(), ledger.dropped_rows()
    assert len(set(trained)) == len(trained) == version * groups_per_step
    assert not set(trained) & set(dropped)
    assert version <= steps


@settings(max_examples=100, deadline=None)
@given(
    groups_per_step=st.integers(1, 3),
    max_staleness=st.integers(0, 2),
    choices=st.lists(st.integers(0, 10_000), min_size=250, max_size=250),
)
def test_whatever_dies_when_no_row_is_trained_twice_and_none_that_was_not_dropped_is_left_out(
    groups_per_step, max_staleness, choices
):
    """The driver dies at any moment; learner and driver go on from any checkpoint at or before the last step given."""
    steps = 4
    total = steps * groups_per_step
    ledger, journal, step = Ledger(groups_per_step, max_staleness, total), [], 0
    training: list[int] = []
    for choice in choices:
        if choice % 23 == 0:
            step = choice % (step + 1) if not training else choice % (step + 2)  # it may have done the step given last
            journal, training = journal[:step], []
            ledger = Ledger(groups_per_step, max_staleness, total)
            ledger.restore(journal, 0.0)
            continue
        busy = [o for o, e in ledger._live.items() if e.state is not GroupState.READY]
        if ledger.may_admit() and choice % 2:
            ledger.admit(f"row-{ledger.counts().total()}", 0.0)
        elif busy:
            order = busy[choice % len(busy)]
            for state in (GroupState.GENERATING, GroupState.SCORING):
                ledger.move(order, state, 0.0)
            ledger.move(order, GroupState.DROPPED if choice % 11 == 0 else GroupState.READY, 0.0, "chance")
        elif training:
            for order in training:
                ledger.move(order, GroupState.TRAINED, 0.0)
            training, step = [], step + 1
        elif (batch := ledger.next_batch()) is not None:
            journal.append(ledger.record(step + 1, batch))
            training = batch
    rows = [row for record in journal for row in record.rows.values()]
    dropped = [row for record in journal for row, _ in record.dropped.values()]
    admitted = journal[-1].admitted if journal else 0
    assert sorted(rows + dropped) == sorted(f"row-{n}" for n in range(admitted))
    assert ledger.trained_rows() == rows[: len(ledger.trained_rows())]
    assert len(ledger.trained_rows()) == step * groups_per_step


def test_records_with_a_gap_are_refused():
    with pytest.raises(ValueError, match="step 2: group 3 follows 2 others"):
        Ledger(2, 0, 4).restore([BatchRecord(1, {0: "a", 1: "b"}), BatchRecord(2, {3: "d", 4: "e"})], 0.0)


def test_a_run_without_failures_ends_after_exactly_its_steps():
    ledger = Ledger(groups_per_step=2, max_staleness=1, total_groups=6)
    done = 0
    while done < 3:
        while ledger.may_admit():
            order = ledger.admit(f"row-{ledger.counts().total()}", 0.0)
            for state in (GroupState.GENERATING, GroupState.SCORING, GroupState.READY):
                ledger.move(order, state, 0.0)
        for order in ledger.next_batch():
            ledger.move(order, GroupState.TRAINED, 0.0)
        done += 1
    assert not ledger.may_admit()
    assert ledger.next_batch() is None
    assert ledger.trained_rows() == [f"row-{i}" for i in range(6)]


def test_an_impossible_change_of_state_is_refused():
    ledger = Ledger(1, 0, 1)
    order = ledger.admit("row", 0.0)
    with pytest.raises(RuntimeError, match="cannot go from admitted to trained"):
        ledger.move(order, GroupState.TRAINED, 0.0)
    with pytest.raises(RuntimeError, match="no slot is free"):
        ledger.admit("other", 0.0)


def test_the_watchdog_line_names_what_groups_wait_for():
    ledger = Ledger(2, 0, 2)
    ledger.move(ledger.admit("a", 0.0), GroupState.GENERATING, 3.0)
    ledger.admit("b", 5.0)
    assert ledger.waiting_for(10.0) == "1 admitted (oldest for 5 s), 1 generating (oldest for 7 s)"
