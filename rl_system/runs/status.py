"""The view of ``rl-system status``."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from rl_system.runs.attempt import read_attempts
from rl_system.runs.directory import RunDirectory
from rl_system.runs.live import LiveState, Process, read_live
from rl_system.runs.sinks import StepMetrics, read_metrics

LOOK_S = 2.0
"""Between two looks of ``--watch``."""
SILENT_S = 30.0
"""A run that has said nothing for so long is not taken for alive."""
_SHOWN = (
    ("reward", "reward/total", "{:.3f}"),
    ("KL", "grpo/kl", "{:.4f}"),
    ("loss", "loss/total", "{:.3f}"),
    ("staleness", "staleness/max", "{:.0f}"),
    ("failed rewards", "failures/rate", "{:.1%}"),
    ("idle actors", "idle/actors", "{:.0%}"),
    ("idle learner", "idle/learner", "{:.0%}"),
    ("sampled tokens/s", "throughput/sampled_tokens_per_s", "{:,.0f}"),
    ("s a step", "time/step", "{:.1f}"),
)


def status_view(run: RunDirectory, now: float) -> RenderableType:
    """State, stage, processes, queue, and the last step.

    Args:
        now: epoch seconds.
    """
    status, live, attempts = run.status(), read_live(run), read_attempts(run)
    state = status.get("state", "unknown")
    parts: list[RenderableType] = [_headline(run, state, status, live, now)]
    if attempts:
        last = attempts[-1]
        job = f", job {last['submission_id']}" if last["submission_id"] else ""
        who = f"attempt {len(attempts)} on {last['host']}, process {last['pid']}{job}"
        parts.append(Text(f"{who}; metrics at {last['metrics']}"))
    if state == "running" and live is not None:
        parts += _now(live)
    parts += _last_step(read_metrics(run.metrics))
    if run.report.exists():
        parts.append(Text(f"report: {run.report}"))
    return Group(*parts)


def _headline(run: RunDirectory, state: str, status: dict[str, object], live: LiveState | None, now: float) -> Text:
    changed = float(str(status.get("changed_s", now)))
    if state != "running":
        reason = f": {status['reason']}" if status.get("reason") else ""
        return Text(f"{run.place}: {state} {duration(now - changed)} ago{reason}", style="bold")
    said = max(live.time_s if live is not None else 0.0, changed)
    text = Text(f"{run.place}: running for {duration(now - changed)}", style="bold")
    if now - said > SILENT_S:
        text.append(f"; has said nothing for {duration(now - said)}: it may have been killed", style="red")
    return text


def _now(live: LiveState) -> list[RenderableType]:
    part = f" {live.done}/{live.total}" if live.total else ""
    parts: list[RenderableType] = [Text(f"stage: {live.stage}{part}")]
    if live.processes:
        parts.append(_table(live.processes))
    if live.groups:
        queue = ", ".join(f"{count} {state}" for state, count in live.groups.items())
        parts.append(Text(f"groups: {queue}; waits: {live.waits}; last progress {live.quiet_s:.0f} s ago"))
    return parts


def _table(processes: Sequence[Process]) -> Table:
    table = Table("process", "state", "does", "weights")
    for p in processes:
        style = "red" if p.state in ("down", "left alone") else ""
        table.add_row(p.name, p.state, p.doing, "" if p.version is None else f"v{p.version}", style=style)
    return table


def _last_step(steps: Sequence[StepMetrics]) -> list[RenderableType]:
    if not steps:
        return []
    values = steps[-1].values
    shown = ", ".join(f"{label} {form.format(values[name])}" for label, name, form in _SHOWN if name in values)
    return [Text(f"step {steps[-1].step}: {shown}")]


def duration(seconds: float) -> str:
    """``2 h 5 min``, ``3 min 12 s`` or ``7 s``."""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes_left = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes_left} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
