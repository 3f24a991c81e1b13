"""``report.html`` of a run: one file that opens offline, made from the files of the run directory only."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from rl_system.runs.charts import COLOURS, Line, Point, gantt, line_chart, moving_mean
from rl_system.runs.directory import RunDirectory
from rl_system.runs.evaluation_files import StoredEvaluation, read_evaluation
from rl_system.runs.files import write_atomic
from rl_system.runs.groups import KeptGroup, read_groups
from rl_system.runs.pictures import STAGES, PictureInliner, read_png
from rl_system.runs.sinks import StepMetrics, read_metrics
from rl_system.runs.summary import paired_bootstrap_ci, read_summary
from rl_system.runs.timeline import TimelineEvent, read_timeline
from vlcot.rewards import COMPONENTS

_SHOWN_GROUPS = 3
"""Groups shown from each end; more are in ``groups/``."""
_STRIP_BYTES, _GROUP_BYTES = 2_600_000, 2_600_000
"""What the pictures of each part may take, so that the report stays below 6 MB."""
_DRAWN_EVENTS = 160
_MOVING_STEPS = 5
CHARTS: Mapping[str, Mapping[str, Sequence[str]]] = {
    "Rewards in training": {
        "total": ["reward/total"],
        **{name: [f"reward/{name}"] for name in COMPONENTS},
    },
    "Policy update": {
        "KL to the reference": ["grpo/kl"],
        "clip fraction": ["grpo/clip_fraction"],
        "entropy (nats per sampled token)": ["grpo/entropy"],
        "importance ratio, mean": ["grpo/ratio_mean"],
        "loss": ["grpo/loss"],
        "gradient norm": ["grpo/grad_norm"],
    },
    "Pipeline": {
        "staleness (versions)": ["staleness/max", "staleness/mean"],
        "idle share of the time": ["idle/actors", "idle/learner"],
        "share of reward time hidden behind generation": ["reward_hidden"],
        "tokens per second": ["throughput/sampled_tokens_per_s", "throughput/tokens_per_s"],
        "images per second": ["throughput/images_per_s"],
        "seconds of a step": ["time/step", "time/generate", "time/reward", "time/train", "time/push_total"],
        "failed rewards": [f"failures/{name}" for name in COMPONENTS],
    },
}
_TEXT_LABELS = ("degradation", "coarse", "middle", "final")
_CURVE_NAMES = {"throughput/sampled_tokens_per_s": "sampled", "throughput/tokens_per_s": "trained"}


def build_report(run: RunDirectory) -> Path:
    """Write ``report.html`` from what is there; parts that a run has not reached yet say so.

    Returns:
        the path of the report.
    """
    summary = read_summary(run)
    html = (
        html_templates()
        .get_template("report.html.j2")
        .render(
            run=run,
            label_texts=lambda texts: zip(_TEXT_LABELS, texts, strict=True),
            status=run.status(),
            now=time.strftime("%Y-%m-%d %H:%M:%S"),
            config=run.config.read_text(),
            summary=summary,
            engines=yaml.safe_dump(summary["engines"], sort_keys=False) if summary else "",
            components=COMPONENTS,
            curves_are="Faint: each step; strong: mean of the last five.",
            **_held_out(run),
            **_training(read_metrics(run.metrics)),
            timeline=_timeline(read_timeline(run.timeline)),
            **_groups(read_groups(run.groups)),
        )
    )
    write_atomic(run.report, html)
    return run.report


def html_templates() -> Environment:
    """Templates of reports, with the filters ``figure``, ``short``, ``signed`` and ``duration``."""
    templates = FileSystemLoader(Path(__file__).with_name("templates"))
    environment = Environment(loader=templates, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.filters |= {"figure": _figure, "short": _short, "signed": _signed, "duration": _duration}
    return environment


def _held_out(run: RunDirectory) -> dict[str, Any]:
    before, after = read_evaluation(run, "before"), read_evaluation(run, "after")
    pictures = PictureInliner(_STRIP_BYTES)
    return {
        "prompts": len(before.prompts) if before else 0,
        "comparison": held_out_rows(before, after, seed_of(run)) if before else [],
        "strips": _strips(before, after, pictures) if before else [],
    }


def seed_of(run: RunDirectory) -> int:
    """Seed of the run, so that intervals equal those of the summary."""
    config = yaml.safe_load(run.config.read_text())
    return int(config.get("seed", 0)) if isinstance(config, dict) else 0


def held_out_rows(before: StoredEvaluation, after: StoredEvaluation | None, seed: int) -> list[dict[str, Any]]:
    """Rows of the table of held-out results: name, before, after, gain and its interval; None where there is none."""

    def figure(prompt: Mapping[str, Any], name: str) -> float | None:
        value: float | None = prompt["components"][name] if name in COMPONENTS else prompt[name]
        return value

    rows: list[dict[str, Any]] = []
    for name in ("total", *COMPONENTS, "psnr", "ssim"):
        old = [figure(p, name) for p in before.prompts]
        if after is None:
            rows.append({"name": name, "before": _mean(old), "after": None, "gain": None})
            continue
        new = [figure(p, name) for p in after.prompts]
        pairs = [(b, a) for b, a in zip(old, new, strict=True) if b is not None and a is not None]
        b_values, a_values = [b for b, _ in pairs], [a for _, a in pairs]
        gain = paired_bootstrap_ci(b_values, a_values, seed) if pairs else None
        rows.append({"name": name, "before": _mean(b_values), "after": _mean(a_values), "gain": gain})
    return rows


def _strips(before: StoredEvaluation, after: StoredEvaluation | None, pictures: PictureInliner) -> list[dict[str, Any]]:
    """One per pictured photograph: shared pictures, then what was written before and after."""
    strips = []
    for i, old in enumerate(before.prompts):
        if not old["pictures"]:
            continue
        lr, hq = (read_png(before.folder / old["pictures"][name]) for name in ("lr", "hq"))
        chains = [_chain_view("before training", old, before.folder, pictures)]
        if after is not None:
            chains.append(_chain_view("after training", after.prompts[i], after.folder, pictures))
        strips.append(
            {
                "row_id": old["row_id"],
                "degradation": old["degradation"],
                "lr": pictures.inline(lr),
                "bicubic": pictures.inline_bicubic(lr, hq.shape[0]),
                "hq": pictures.inline(hq),
                "chains": chains,
            }
        )
    return strips


def _chain_view(when: str, prompt: Mapping[str, Any], folder: Path, pictures: PictureInliner) -> dict[str, Any]:
    return {
        "when": when,
        "pictures": [(stage, pictures.inline_file(folder, prompt["pictures"].get(stage))) for stage in STAGES],
        **{name: prompt[name] for name in ("total", "psnr", "ssim", "texts", "errors")},
    }


def _training(steps: Sequence[StepMetrics]) -> dict[str, Any]:
    """Charts by section; a chart without any value is left out."""
    curves = {name for step in steps for name in step.values}
    sections = {
        title: [_chart(name, [m for m in metrics if m in curves], steps) for name, metrics in charts.items()]
        for title, charts in CHARTS.items()
    }
    return {
        "last_step": steps[-1].step if steps else 0,
        "sections": {title: [c for c in charts if c["legend"]] for title, charts in sections.items()},
    }


def _chart(title: str, metrics: Sequence[str], steps: Sequence[StepMetrics]) -> dict[str, Any]:
    """A single curve is drawn faint, with its moving mean; several are drawn as they are."""
    lines: list[Line] = []
    legend: list[dict[str, Any]] = []
    for metric, colour in zip(metrics, COLOURS, strict=False):
        points: list[Point] = [(s.step, s.values.get(metric, math.nan)) for s in steps]
        lines.append(Line(points, colour, faint=len(metrics) == 1 and len(points) > _MOVING_STEPS))
        if lines[-1].faint:
            lines.append(Line(moving_mean(points, _MOVING_STEPS), colour))
        name = _CURVE_NAMES.get(metric, metric.rpartition("/")[2].replace("_", " "))
        legend.append({"name": name, "colour": colour, "last": points[-1][1]})
    return {"title": title, "legend": legend, "svg": line_chart(lines, title)}


def _timeline(events: Sequence[TimelineEvent]) -> dict[str, Any] | None:
    """Time line of a legible window in the middle of the run, and the busy share of each process over all of it."""
    if not events:
        return None
    origin, end = events[0].start_s, max(e.end_s for e in events)
    middle = max(0, (len(events) - _DRAWN_EVENTS) // 2)
    window = events[middle : middle + _DRAWN_EVENTS]
    complete = len(window) == len(events)
    start_s = origin if complete else window[0].start_s
    end_s = end if complete else window[-1].start_s
    rows: dict[str, list[TimelineEvent]] = {e.process: [] for e in sorted(events, key=lambda e: e.process)}
    for event in events:
        if event.end_s > start_s and event.start_s < end_s:
            rows[event.process].append(event)
    span = max(end - origin, 1e-9)
    return {
        "svg": gantt(rows, start_s, end_s, origin),
        "complete": complete,
        "from_s": start_s - origin,
        "to_s": end_s - origin,
        "span_s": end - origin,
        "busy": {process: _busy_s([e for e in events if e.process == process]) / span for process in rows},
    }


def _busy_s(events: Sequence[TimelineEvent]) -> float:
    """Seconds in which at least one event (they come sorted by start) is open."""
    busy, reached = 0.0, -math.inf
    for event in events:
        busy += max(0.0, event.end_s - max(event.start_s, reached))
        reached = max(reached, event.end_s)
    return busy


def _groups(groups: Sequence[KeptGroup]) -> dict[str, Any]:
    best = groups[:_SHOWN_GROUPS]
    worst = groups[max(len(best), len(groups) - _SHOWN_GROUPS) :][::-1]
    pictures = PictureInliner(_GROUP_BYTES)
    ends = {"Best groups": best, "Worst groups": worst}
    views = {title: [_group_view(group, pictures) for group in chosen] for title, chosen in ends.items()}
    return {"groups": {title: [v for v in shown if v is not None] for title, shown in views.items() if shown}}


def _group_view(group: KeptGroup, pictures: PictureInliner) -> dict[str, Any] | None:
    """None if the run, which may still go on, has just replaced the group."""
    try:
        samples = []
        for sample in group.record["samples"]:
            inlined = [(stage, pictures.inline_file(group.folder, sample["pictures"].get(stage))) for stage in STAGES]
            samples.append({**sample, "pictures": inlined})
        return {**group.record, "lr": pictures.inline_file(group.folder, "lr.png"), "samples": samples}
    except FileNotFoundError:
        return None


def _mean(values: Sequence[float | None]) -> float | None:
    present = [value for value in values if value is not None]
    return float(np.mean(present)) if present else None


def _figure(value: float | None, digits: int = 3) -> str:
    if value is None or math.isnan(value):
        return "–"
    return f"{value:.{digits}f}" if 1e-3 <= abs(value) < 1e4 or value == 0 else f"{value:.2g}"


def _short(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _signed(value: float, digits: int = 3) -> Markup:
    return Markup("{}{:.{}f}").format("−" if value < 0 else "+", abs(value), digits)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
