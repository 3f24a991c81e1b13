"""What ``make chaos`` decides by itself: who is killed, what counts as recovered, which promises are broken."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest

from benchmarks.chaos import evidence, processes
from benchmarks.chaos.cases import LAST_KILL_AFTER, NAMES, WITHIN_S, Setting
from benchmarks.chaos.evidence import Target
from benchmarks.chaos.processes import Descendants, Row
from rl_system.coordination.ledger import BatchRecord
from rl_system.runs.journal import Journal
from rl_system.runs.sinks import JsonlSink, StepMetrics
from rl_system.runs.timeline import TimelineEvent

pytestmark = pytest.mark.unit

TARGET = Target(steps=2, groups_per_step=2, max_staleness=1)
SUMMARY = {"steps": 2, "groups_trained": 4, "weight_checksum_match": True, "max_staleness_seen": 1}
ROWS = ["a", "b", "c", "d"]
TABLE = [
    Row(10, 1, "python -m rl_system train", 0.0),
    Row(11, 10, "/ray/raylet --node_ip_address=127.0.0.1", 0.0),
    Row(12, 11, "ray::RolloutActor.generate", 0.0),
    Row(13, 12, "VLLM::EngineCore", 0.0),
    Row(14, 13, "VLLM::Worker", 0.0),
    Row(15, 11, "ray::ServeReplica:qwen_vl:qwen_vl", 0.0),
    Row(16, 15, "VLLM::EngineCore", 0.0),
    Row(17, 11, "ray::ServeReplica:grounded_sam:grounded_sam", 0.0),
    Row(19, 11, "ray::RayTrainWorker", 0.0),
    Row(18, 11, "ray::RayTrainWorker.execute", 0.0),
    Row(20, 11, "ray::TrainController", 0.0),
]


@pytest.mark.parametrize(
    ("find", "pids"),
    [
        (processes.rollout_actors, [12]),
        (processes.rollout_engines, [13]),
        (processes.learner_ranks, [18, 19]),
        (processes.replicas("grounded_sam"), [17]),
        (processes.replicas("qwen_vl"), [15]),
    ],
)
def test_each_part_is_found_by_its_title_and_its_place(find, pids):
    assert [row.pid for row in find(TABLE)] == pids


def test_processes_whose_parent_died_are_still_known_and_killed_and_others_are_not():
    nap = "import time; time.sleep(60)"
    child = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', '{nap}']); {nap}"
    stranger = subprocess.Popen([sys.executable, "-c", nap])
    parent = subprocess.Popen([sys.executable, "-c", child])
    try:
        family = Descendants(parent.pid)
        deadline = time.monotonic() + 20
        while len(rows := family.rows()) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert {row.parent for row in rows} == {os.getpid(), parent.pid}
        parent.kill()
        parent.wait()
        (orphan,) = family.rows()
        assert orphan.parent != parent.pid
        assert family.kill() == 1
        while family.rows() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert family.rows() == []
        assert stranger.poll() is None
    finally:
        for process in (parent, stranger):
            process.kill()
            process.wait()


def a_run(tmp_path, *steps: tuple[int, dict[int, str]], summary: dict | None = SUMMARY, reported=(1, 2)):
    journal = Journal(tmp_path / "journal.jsonl", 0)
    for step, rows in steps:
        journal.write(BatchRecord(step, rows))
    sink = JsonlSink(tmp_path / "metrics.jsonl")
    for step in reported:
        sink.log(step, {})
    if summary is not None:
        (tmp_path / "summary.json").write_text(json.dumps(summary))
    return tmp_path


WHOLE = ((1, {0: "a", 1: "b"}), (2, {2: "c", 3: "d"}))


def test_a_run_that_trained_the_same_rows_in_another_order_breaks_nothing(tmp_path):
    run = a_run(tmp_path, (1, {0: "b", 1: "a"}), (2, {2: "d", 3: "c"}))
    assert evidence.broken_promises(run, TARGET, ROWS) == []


@pytest.mark.parametrize(
    ("steps", "changed", "said"),
    [
        (((1, {0: "a", 1: "b"}), (2, {2: "c", 3: "c"})), {}, "row c was trained 1 times more"),
        (((1, {0: "a", 1: "b"}), (2, {2: "c", 3: "c"})), {}, "row d was trained 0 times"),
        (((1, {0: "a", 1: "b"}), (2, {1: "c", 3: "d"})), {}, "group 1 was trained 2 times"),
        (WHOLE[:1], {}, "has done 2 steps"),
        (WHOLE, {"steps": 1}, "steps is 1, not 2"),
        (WHOLE, {"groups_trained": 6}, "groups_trained is 6, not 4"),
        (WHOLE, {"weight_checksum_match": False}, "weight_checksum_match is False"),
        (WHOLE, {"max_staleness_seen": 2}, "max_staleness_seen is 2"),
    ],
)
def test_what_a_run_does_not_keep_is_named(tmp_path, steps, changed, said):
    broken = evidence.broken_promises(a_run(tmp_path, *steps, summary=SUMMARY | changed), TARGET, ROWS)
    assert any(said in each for each in broken), broken


def test_a_run_without_an_end_is_named(tmp_path):
    assert evidence.broken_promises(a_run(tmp_path, *WHOLE, summary=None), TARGET, ROWS) == ["the run has no summary"]


def test_wrong_reports_are_named(tmp_path):
    run = a_run(tmp_path, *WHOLE, reported=(1, 1))
    assert evidence.missing_metrics(run, 2) == [2]
    assert evidence.broken_promises(run, TARGET, ROWS) == ["reported steps end with 1", "step 1 was reported 2 times"]


def test_only_work_that_was_begun_after_the_kill_shows_that_a_part_works_again():
    events = [
        TimelineEvent("rollout rollout-0", "old", 9.0, 12.0),
        TimelineEvent("rewards", "old", 12.0, 13.0),
        TimelineEvent("rewards", "new", 9.0, 9.5),  # of the attempt that was killed: it is generated again
        TimelineEvent("rollout rollout-0", "new", 11.0, 15.0),
        TimelineEvent("rewards", "new", 15.0, 18.0),
        TimelineEvent("learner", "step 3", 14.0, 16.0),
    ]
    assert evidence.group_generated(events, killed_s=10.0) == 15.0
    assert evidence.group_scored(events, killed_s=10.0) == 18.0
    assert evidence.group_scored(events, killed_s=11.5) is None


def test_a_step_that_is_made_again_is_no_recovery():
    metrics = [StepMetrics(step, time_s, {}) for step, time_s in ((3, 5.0), (4, 12.0), (4, 30.0), (5, 33.0), (6, 36.0))]
    assert evidence.next_step(metrics, after_s=10.0, above=4) == 33.0
    assert evidence.next_step(metrics, after_s=34.0, above=4) == 36.0
    assert evidence.next_step(metrics, after_s=40.0, above=4) is None


def test_the_seed_decides_when_something_is_killed(tmp_path):
    def moments(seed):
        return [Setting(tmp_path, tmp_path, 0, seed).moment(name)[1:] for name in NAMES]

    assert moments(1) == moments(1) != moments(2)
    assert all(1 <= step <= LAST_KILL_AFTER and 0 <= delay <= WITHIN_S for step, delay in moments(3))
