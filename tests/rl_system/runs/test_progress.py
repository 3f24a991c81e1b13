"""The progress view on a pipe and on a terminal."""

from __future__ import annotations

from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from rl_system.runs.progress import Progress, print_summary

pytestmark = pytest.mark.unit

METRICS = {"reward/total": 2.0, "throughput/sampled_tokens_per_s": 1234.0, "staleness/max": 1.0}


def test_a_pipe_gets_one_line_per_stage_and_step():
    out = StringIO()
    with Progress(Console(file=out, width=60)) as progress:
        progress.stage("evaluating", 1, 64)
        progress.stage("evaluating", 2, 64)
        progress.stage("training")
        progress.update(0, 2, {}, {"generating": 4})
        progress.update(1, 2, METRICS, {"generating": 3, "trained": 1})
        progress.update(1, 2, METRICS, {"generating": 2, "trained": 1})
        progress.update(2, 2, METRICS | {"reward/total": 3.0}, {"trained": 2})
    first, second, third, fourth = out.getvalue().splitlines()
    assert (first, second) == ("evaluating", "training")
    assert third.startswith("step 1/2  reward 2.000  1,234 tokens/s  staleness 1  groups: 3 generating, 1 trained")
    assert fourth.startswith("step 2/2  reward 2.500") and fourth.endswith("ETA 0:00")


def test_a_terminal_gets_a_live_view_that_ends_with_the_last_state():
    out = StringIO()
    with Progress(Console(file=out, force_terminal=True, width=100)) as progress:
        progress.stage("training")
        progress.update(3, 9, METRICS, {"[bold]odd": 1})
    assert "3/9" in out.getvalue() and "1 [bold]odd" in out.getvalue()


def test_the_final_table_shows_gain_interval_and_report():
    out = StringIO()
    summary = {
        "reward_gain": 0.25,
        "reward_gain_ci95": [0.1, 0.4],
        "reward_before": 1.5,
        "reward_after": 1.75,
        "rewards_before": {"format": 0.9, "understanding": None},
        "rewards_after": {"format": 1.0, "understanding": None},
        **{"psnr_before": 20.0, "psnr_after": 20.5, "ssim_before": 0.5, "ssim_after": 0.51},
        **{"prompts": 64, "steps": 20, "wall_s": 300.0},
    }
    print_summary(summary, Path("/runs/[toy]/report.html"), Console(file=out, width=100))
    text = out.getvalue()
    assert "reward gain +0.250, 95 % interval +0.100 to +0.400" in text
    assert "report: /runs/[toy]/report.html" in text
    assert "1.500" in text and "20.50" in text
