"""Several runs in one page that opens offline: what they were set to, what they achieved, their curves."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rl_system.config.resume import settings_of
from rl_system.runs.charts import COLOURS, Line, Point, line_chart, moving_mean
from rl_system.runs.directory import RunDirectory
from rl_system.runs.evaluation_files import StoredEvaluation, read_evaluation
from rl_system.runs.files import write_atomic
from rl_system.runs.pictures import PictureInliner, read_png
from rl_system.runs.report import CHARTS, held_out_rows, html_templates, seed_of
from rl_system.runs.sinks import StepMetrics, read_metrics
from rl_system.runs.summary import read_summary
from vlcot.rewards import COMPONENTS

MOST = len(COLOURS)
_SMOOTH_STEPS = 5
_PICTURE_BYTES = 3_000_000
_NAMES = {"total": "total reward", "psnr": "PSNR (dB)", "ssim": "SSIM"}
_NOT_SHOWN = ("name", "overwrite", "resume", "output_dir", "scratch_dir")


def build_comparison(runs: Sequence[RunDirectory], output: Path) -> Path:
    """Write the page to ``output``; parts that a run has not reached yet are left blank.

    Args:
        runs: 2 to 6.

    Raises:
        ValueError: other numbers of runs, or two runs of one name from the same folder.
    """
    if not 2 <= len(runs) <= MOST:
        raise ValueError(f"2 to {MOST} runs are put side by side, not {len(runs)}")
    if len({run.path.resolve() for run in runs}) < len(runs):
        raise ValueError("the same run is named twice")
    names = _names(runs)
    html = (
        html_templates()
        .get_template("comparison.html.j2")
        .render(
            names=names,
            colours=COLOURS,
            curves_are="Means of the last five steps.",
            now=time.strftime("%Y-%m-%d %H:%M:%S"),
            states=[run.status().get("state", "unknown") for run in runs],
            settings=_differing_settings(runs),
            results=_results(runs),
            facts=_facts(runs),
            strips=_strips(runs),
            sections=_sections(names, [read_metrics(run.metrics) for run in runs]),
        )
    )
    write_atomic(output, html)
    return output


def _names(runs: Sequence[RunDirectory]) -> list[str]:
    """Their names; the paths where two are called alike."""
    names = [run.name for run in runs]
    return names if len(set(names)) == len(names) else [str(run.path) for run in runs]


def _differing_settings(runs: Sequence[RunDirectory]) -> list[tuple[str, list[str]]]:
    """Settings that are not the same in all runs, with the value in each."""
    every = [settings_of(run.config.read_text()) for run in runs]
    keys = sorted({key for settings in every for key in settings} - set(_NOT_SHOWN))
    rows = [(key, [str(settings.get(key, "–")) for settings in every]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


def _results(runs: Sequence[RunDirectory]) -> list[dict[str, Any]]:
    """Rows of the table of held-out results, with one cell for each run: before, after, gain and its interval."""
    tables = []
    for run in runs:
        before, after = read_evaluation(run, "before"), read_evaluation(run, "after")
        rows = held_out_rows(before, after, seed_of(run)) if before else []
        tables.append({row["name"]: row for row in rows})
    names = ("total", *COMPONENTS, "psnr", "ssim")
    rows = [{"name": _NAMES.get(n, n), "key": n, "cells": [table.get(n) for table in tables]} for n in names]
    return [row for row in rows if any(row["cells"])]


def _facts(runs: Sequence[RunDirectory]) -> list[tuple[str, list[Any]]]:
    summaries = [read_summary(run) or {} for run in runs]
    shown = {"steps": "steps", "wall time, s": "wall_s", "KL at the end": "kl_final", "prompts": "prompts"}
    return [(label, [summary.get(key) for summary in summaries]) for label, key in shown.items()]


def _strips(runs: Sequence[RunDirectory]) -> list[dict[str, Any]]:
    """Held-out photographs that every run has pictured: LR, ground truth, and the final image after training."""
    stored = [read_evaluation(run, "after") for run in runs]
    complete = [evaluation for evaluation in stored if evaluation is not None]
    if len(complete) < len(runs):
        return []
    by_row = [{p["row_id"]: p for p in evaluation.prompts if p["pictures"]} for evaluation in complete]
    inliner = PictureInliner(_PICTURE_BYTES)
    return [
        _strip(row_id, [prompts[row_id] for prompts in by_row], complete, inliner)
        for row_id in by_row[0]
        if all(row_id in prompts for prompts in by_row)
    ]


def _strip(
    row_id: str, prompts: Sequence[Any], stored: Sequence[StoredEvaluation], inliner: PictureInliner
) -> dict[str, Any]:
    first, folder = prompts[0]["pictures"], stored[0].folder
    finals = zip(prompts, stored, strict=True)
    return {
        "row_id": row_id,
        "lr": inliner.inline(read_png(folder / first["lr"])),
        "hq": inliner.inline(read_png(folder / first["hq"])),
        "finals": [(p["total"], inliner.inline_file(e.folder, p["pictures"].get("final"))) for p, e in finals],
    }


def _sections(names: Sequence[str], runs: Sequence[Sequence[StepMetrics]]) -> dict[str, list[dict[str, Any]]]:
    """One chart for each metric of the report, with a curve for each run (moving mean over five steps)."""
    found = {metric for steps in runs for step in steps for metric in step.values}
    return {
        title: [
            _chart(f"{name}: {metric}" if len(metrics) > 1 else name, metric, names, runs)
            for name, metrics in charts.items()
            for metric in metrics
            if metric in found
        ]
        for title, charts in CHARTS.items()
    }


def _chart(title: str, metric: str, names: Sequence[str], runs: Sequence[Sequence[StepMetrics]]) -> dict[str, Any]:
    lines, legend = [], []
    for name, colour, steps in zip(names, COLOURS, runs, strict=False):
        points: list[Point] = [(step.step, step.values.get(metric, math.nan)) for step in steps]
        lines.append(Line(moving_mean(points, _SMOOTH_STEPS), colour))
        legend.append({"name": name, "colour": colour, "last": lines[-1].points[-1][1] if points else math.nan})
    return {"title": title, "legend": legend, "svg": line_chart(lines, title)}
