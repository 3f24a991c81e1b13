"""What a run directory says: was everything trained once, and when did it go on after a kill."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from rl_system.runs.journal import read_journal
from rl_system.runs.sinks import StepMetrics, read_metrics
from rl_system.runs.timeline import TimelineEvent


@dataclass(frozen=True)
class Target:
    """What each run must reach."""

    steps: int
    groups_per_step: int
    max_staleness: int


def trained_rows(run: Path, steps: int) -> list[tuple[int, str]]:
    """Order of admission and row id of each trained group.

    Raises:
        ValueError: the journal does not hold exactly ``steps`` steps.
    """
    return [item for record in read_journal(run / "journal.jsonl", steps) for item in record.rows.items()]


def broken_promises(run: Path, target: Target, undisturbed: Iterable[str]) -> list[str]:
    """What a finished run does not keep, in words.

    Args:
        undisturbed: row ids that the undisturbed run trained.
    """
    summary_file = run / "summary.json"
    if not summary_file.exists():
        return ["the run has no summary"]
    try:
        trained = trained_rows(run, target.steps)
    except ValueError as error:
        return [str(error)]
    reported = [metrics.step for metrics in read_metrics(run / "metrics.jsonl")]
    summary = json.loads(summary_file.read_text())
    return [
        *_wrong_summary(summary, target),
        *_wrong_rows(trained, undisturbed),
        *([] if max(reported, default=0) == target.steps else [f"reported steps end with {max(reported, default=0)}"]),
        *(f"step {step} was reported {n} times" for step, n in Counter(reported).items() if n > 1),
    ]


def _wrong_summary(summary: Mapping[str, object], target: Target) -> list[str]:
    wanted = {
        "steps": target.steps,
        "groups_trained": target.steps * target.groups_per_step,
        "weight_checksum_match": True,
    }
    wrong = [f"{key} is {summary[key]}, not {value}" for key, value in wanted.items() if summary[key] != value]
    staleness = summary["max_staleness_seen"]
    assert isinstance(staleness, int)
    return wrong + ([f"max_staleness_seen is {staleness}"] if staleness > target.max_staleness else [])


def _wrong_rows(trained: list[tuple[int, str]], undisturbed: Iterable[str]) -> list[str]:
    groups = Counter(order for order, _ in trained)
    rows, wanted = Counter(row for _, row in trained), Counter(undisturbed)
    return [
        *(f"group {order} was trained {n} times" for order, n in groups.items() if n > 1),
        *(f"row {row} was trained {rows[row]} times, undisturbed {n} times" for row, n in (wanted - rows).items()),
        *(f"row {row} was trained {n} times more than undisturbed" for row, n in (rows - wanted).items()),
    ]


def missing_metrics(run: Path, steps: int) -> list[int]:
    """Steps that were trained and have no line of metrics."""
    reported = {metrics.step for metrics in read_metrics(run / "metrics.jsonl")}
    return sorted(set(range(1, steps + 1)) - reported)


def group_generated(events: Iterable[TimelineEvent], killed_s: float) -> float | None:
    """When the first group was whole whose generation began after the kill; epoch seconds."""
    return min((e.end_s for e in events if e.process.startswith("rollout ") and e.start_s > killed_s), default=None)


def group_scored(events: Iterable[TimelineEvent], killed_s: float) -> float | None:
    """When the first group had its rewards whose generation began after the kill; epoch seconds."""
    events = list(events)
    new = {e.name for e in events if e.process.startswith("rollout ") and e.start_s > killed_s}
    scored = (e for e in events if e.process == "rewards" and e.name in new)
    return min((e.end_s for e in scored if e.start_s > killed_s), default=None)  # groups are generated again


def next_step(metrics: Iterable[StepMetrics], after_s: float, above: int) -> float | None:
    """When the first step behind step ``above`` was reported, after ``after_s``; epoch seconds."""
    return min((m.time_s for m in metrics if m.time_s > after_s and m.step > above), default=None)
