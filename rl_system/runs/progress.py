"""What a person sees while a run goes on, and at its end."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bar
from rich.table import Table
from rich.text import Text

_MOVING = 10
"""Steps that the moving reward and the ETA look back over."""


class Progress:
    """Live view on a terminal; elsewhere plain lines, one per stage and one per step at most."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console()
        self._bar = Bar(
            TextColumn("[bold]{task.description}"), BarColumn(), MofNCompleteColumn(), console=self._console
        )
        self._task = self._bar.add_task("starting", total=None)
        self._line = Text()
        self._live: Live | None = None
        self._stage = ""
        self._step = 0
        self._rewards: deque[float] = deque(maxlen=_MOVING)
        self._finished: deque[tuple[int, float]] = deque(maxlen=_MOVING + 1)

    def __enter__(self) -> Progress:
        if self._console.is_terminal:
            self._live = Live(Group(self._bar, self._line), console=self._console, refresh_per_second=2)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    @property
    def now(self) -> tuple[str, int, int | None]:
        """Stage, and how many parts of it are done, of how many (None: not known)."""
        task = self._bar.tasks[self._task]
        return task.description, int(task.completed), None if task.total is None else int(task.total)

    def stage(self, text: str, done: int = 0, total: int | None = None) -> None:
        """Say what the run is doing; ``done`` of ``total`` parts of it where that is known."""
        self._bar.update(self._task, description=text, completed=done, total=total)
        if text != self._stage:
            self._stage = text
            self._line.plain = ""
            if self._live is None:
                self._say(text)

    def update(self, step: int, steps: int, metrics: Mapping[str, float], counts: Mapping[str, int]) -> None:
        """Show ``step`` of ``steps`` trained steps.

        Args:
            metrics: of the last step, by metric name; those that are missing are not shown.
            counts: groups by state.
        """
        is_new = step > self._step
        if is_new or not self._finished:
            self._step = step
            self._finished.append((step, time.monotonic()))
        if is_new and "reward/total" in metrics:
            self._rewards.append(metrics["reward/total"])
        self._bar.update(self._task, completed=step, total=steps)
        self._line.plain = self._describe(steps, metrics, counts)
        if is_new and self._live is None:
            self._say(f"step {step}/{steps}  {self._line.plain}")

    def _describe(self, steps: int, metrics: Mapping[str, float], counts: Mapping[str, int]) -> str:
        parts = []
        if self._rewards:
            parts.append(f"reward {sum(self._rewards) / len(self._rewards):.3f}")
        if "loss/total" in metrics:
            parts.append(f"loss {metrics['loss/total']:.3f}")
        for rate in ("throughput/sampled_tokens_per_s", "throughput/tokens_per_s"):
            if rate in metrics:
                parts.append(f"{metrics[rate]:,.0f} tokens/s")
                break
        if "staleness/max" in metrics:
            parts.append(f"staleness {metrics['staleness/max']:.0f}")
        if counts:
            parts.append("groups: " + ", ".join(f"{count} {state}" for state, count in counts.items()))
        if (eta := self._eta_s(steps)) is not None:
            parts.append(f"ETA {int(eta) // 60}:{int(eta) % 60:02d}")
        return "  ".join(parts)

    def _eta_s(self, steps: int) -> float | None:
        """Seconds to the last step at the pace of the last steps; None before there is a pace."""
        (first, started), (last, ended) = self._finished[0], self._finished[-1]
        return (steps - last) * (ended - started) / (last - first) if last > first else None

    def _say(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)


def print_summary(summary: Mapping[str, Any], report_path: Path | str, console: Console | None = None) -> None:
    """Print the table of a finished run and where its report lies."""
    low, high = summary["reward_gain_ci95"]
    table = Table(title=f"{summary['prompts']} held-out prompts, {summary['steps']} steps, {summary['wall_s']:.0f} s")
    for column in ("", "before", "after"):
        table.add_column(column, justify="left" if not column else "right")
    for name in summary["rewards_before"]:
        table.add_row(name, _shown(summary["rewards_before"][name]), _shown(summary["rewards_after"][name]))
    table.add_row("total reward", _shown(summary["reward_before"]), _shown(summary["reward_after"]), style="bold")
    table.add_section()
    table.add_row("PSNR (no reward)", _shown(summary["psnr_before"], 2), _shown(summary["psnr_after"], 2))
    table.add_row("SSIM (no reward)", _shown(summary["ssim_before"]), _shown(summary["ssim_after"]))
    out = console or Console()
    out.print(table)
    out.print(f"reward gain {summary['reward_gain']:+.3f}, 95 % interval {low:+.3f} to {high:+.3f}", highlight=False)
    out.print(f"report: {report_path}", markup=False, highlight=False, soft_wrap=True)


def _shown(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
