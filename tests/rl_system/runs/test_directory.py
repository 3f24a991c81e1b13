"""The run directory, metrics and time line on disk."""

from __future__ import annotations

import json
import math

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rl_system.runs.directory import RunDirectory
from rl_system.runs.files import write_atomic
from rl_system.runs.sinks import CompositeSink, JsonlSink, TensorBoardSink, read_metrics
from rl_system.runs.timeline import TimelineEvent, TimelineWriter, read_timeline

pytestmark = pytest.mark.unit


def test_an_existing_run_is_refused_and_kept_as_it_is(tmp_path):
    first = RunDirectory.create(tmp_path, "toy", "seed: 0\n")
    with pytest.raises(ValueError, match=r"exists already.*overwrite=true"):
        RunDirectory.create(tmp_path, "toy", "seed: 1\n")
    assert first.config.read_text() == "seed: 0\n"
    assert [p.name for p in tmp_path.iterdir()] == ["toy"]


def test_overwriting_moves_older_runs_aside_and_loses_none(tmp_path):
    for seed in range(3):
        RunDirectory.create(tmp_path, "toy", f"seed: {seed}\n", overwrite=True)
    configs = {p.name: RunDirectory.open(p).config.read_text() for p in tmp_path.iterdir()}
    assert configs == {"toy": "seed: 2\n", "toy.1": "seed: 0\n", "toy.2": "seed: 1\n"}


@pytest.mark.parametrize("name", ["", "../elsewhere", "a/b", "-x", ".hidden"])
def test_a_name_that_is_no_plain_name_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match="run name"):
        RunDirectory.create(tmp_path, name, "")


def test_opening_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match="not the directory of a run"):
        RunDirectory.open(tmp_path)


def test_status_keeps_the_start_and_gives_the_reason(tmp_path):
    run = RunDirectory.create(tmp_path, "toy", "")
    started = run.status()
    run.set_status("failed", "the detector did not answer")
    failed = run.status()
    assert (started["state"], failed["state"], failed["reason"]) == ("running", "failed", "the detector did not answer")
    assert failed["started_s"] == started["started_s"] <= failed["changed_s"]


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "summary.json"
    write_atomic(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomic(path, "new \ud800")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["summary.json"]


def test_metrics_cut_off_in_the_middle_of_a_line_are_read_with_a_warning_and_written_on(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    sink = JsonlSink(path)
    for step in (1, 2):
        sink.log(step, {"reward/total": step / 2})
    sink.close()
    path.write_bytes(path.read_bytes()[:-20])  # killed in the middle of the line of step 2
    assert [row.step for row in read_metrics(path)] == [1]
    assert "line 2 is incomplete" in caplog.text
    resumed = JsonlSink(path)
    resumed.log(2, {"reward/total": 1.0})
    resumed.close()
    assert [(row.step, row.values["reward/total"]) for row in read_metrics(path)] == [(1, 0.5), (2, 1.0)]


def test_values_that_are_not_finite_become_null_and_are_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    sink = JsonlSink(path)
    sink.log(7, {"grpo/kl": math.nan, "grpo/loss": math.inf, "reward/total": 1.0})
    sink.close()
    record = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert record["nonfinite"] == ["grpo/kl", "grpo/loss"]
    assert (record["grpo/kl"], record["grpo/loss"], record["reward/total"]) == (None, None, 1.0)
    (row,) = read_metrics(path)
    assert math.isnan(row.values["grpo/kl"]) and "nonfinite" not in row.values


def test_a_metric_cannot_take_the_name_of_another_field(tmp_path):
    with pytest.raises(ValueError, match="'step'"):
        JsonlSink(tmp_path / "m.jsonl").log(1, {"step": 2.0})


def test_every_sink_gets_the_same_names_and_values(tmp_path):
    sink = CompositeSink([JsonlSink(tmp_path / "metrics.jsonl"), TensorBoardSink(tmp_path / "tb")])
    sink.log(3, {"reward/total": 1.25, "grpo/kl": 0.5})
    sink.close()
    events = EventAccumulator(str(tmp_path / "tb")).Reload()
    board = {tag: (e.step, e.value) for tag in events.Tags()["scalars"] for e in events.Scalars(tag)}
    (row,) = read_metrics(tmp_path / "metrics.jsonl")
    assert board == {name: (row.step, value) for name, value in row.values.items()}
    assert board == {"reward/total": (3, 1.25), "grpo/kl": (3, 0.5)}


def test_the_time_line_comes_back_in_order_of_start(tmp_path):
    writer = TimelineWriter(tmp_path / "timeline.jsonl")
    events = [TimelineEvent("learner", "train", 5.0, 6.0), TimelineEvent("actor-0", "generate", 1.0, 4.0)]
    for event in events:
        writer.write(event)
    writer.close()
    assert read_timeline(tmp_path / "timeline.jsonl") == events[::-1]


def test_an_event_that_ends_before_it_starts_is_refused():
    with pytest.raises(ValueError, match="before it starts"):
        TimelineEvent("learner", "train", 6.0, 5.0)
