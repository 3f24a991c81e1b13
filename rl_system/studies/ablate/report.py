"""The report of a study: each variant against the base, with intervals, and pictures."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape
from PIL import Image

from rl_system.runs.directory import RunDirectory
from rl_system.runs.evaluation_files import read_evaluation
from rl_system.runs.files import write_atomic, write_json
from rl_system.runs.pictures import PictureInliner, read_png
from rl_system.runs.summary import paired_bootstrap_ci
from rl_system.studies.ablate.plan import Plan, Result
from rl_system.studies.ablate.settings import AblateConfig, chosen_variants
from vlcot.metrics import METRICS
from vlcot.rewards import COMPONENTS

_SHOWN, _PICTURE_BYTES = 6, 4_000_000
_LOWER_IS_BETTER = frozenset(name for name, metric in METRICS.items() if metric.lower_is_better)


@dataclass(frozen=True)
class Cell:
    """One figure of one variant.

    Attributes:
        mean: over all images or prompts and seeds.
        by_seed: mean of each seed.
        difference: variant minus base with the ends of its 95 % interval, None for the base itself.
        verdict: ``base better``, ``variant better`` or ``no difference shown``; empty for the base.
    """

    mean: float
    by_seed: tuple[float, ...]
    difference: tuple[float, float, float] | None
    verdict: str


Figures = Mapping[str, Mapping[str, np.ndarray]]
"""Figure -> variant -> float64 [seeds, images]; a variant that lacks it is not there."""


def test_figures(scores: Sequence[Mapping[str, Any]], results: Sequence[Result]) -> dict[str, dict[str, np.ndarray]]:
    """Metrics of the restored test images; ``scores`` as ``rl-system evaluate`` wrote them to scores.json."""
    images = {score["method"]: score["images"] for score in scores}
    names = sorted(images[results[0].method])
    metrics = [m for m in METRICS if all(m in values for values in images[results[0].method].values())]
    return {
        metric: _by_variant(results, lambda r, m=metric: [images[r.method][name][m] for name in names])
        for metric in metrics
    }


def prompt_figures(results: Sequence[Result]) -> dict[str, dict[str, np.ndarray]]:
    """Rewards on the held-out prompts of the runs; one that a run does not give on every prompt is left out there."""

    def values(result: Result, name: str) -> list[float] | None:
        stored = read_evaluation(RunDirectory.open(result.run), result.moment) if result.run else None
        found = [figures.components.get(name) for figures in stored.figures] if stored else [None]
        # Objects are absent from the same photographs in every run: they do not count anywhere.
        return [np.nan if v is None else v for v in found] if any(v is not None for v in found) else None

    return {name: _by_variant(results, lambda r, n=name: values(r, n)) for name in COMPONENTS}


def _by_variant(results: Sequence[Result], values: Any) -> dict[str, np.ndarray]:
    found: dict[str, list[Any]] = {}
    for result in results:
        found.setdefault(result.variant, []).append(values(result))
    return {name: np.array(rows, dtype=np.float64) for name, rows in found.items() if all(r is not None for r in rows)}


def compare(figures: Figures, base: str) -> dict[str, dict[str, Cell]]:
    """Figure -> variant -> cell. Differences are paired by image; seeds are averaged before images are resampled."""
    table: dict[str, dict[str, Cell]] = {}
    for name, of_variant in figures.items():
        if base not in of_variant:
            continue
        table[name] = {v: _cell(values, of_variant[base], v == base, name) for v, values in of_variant.items()}
    return table


def _cell(values: np.ndarray, base: np.ndarray, is_base: bool, name: str) -> Cell:
    mean, by_seed = float(np.nanmean(values)), tuple(np.nanmean(values, axis=1).tolist())
    if is_base:
        return Cell(mean, by_seed, None, "")
    pairs = np.stack([base.mean(axis=0), values.mean(axis=0)])
    pairs = pairs[:, np.isfinite(pairs).all(axis=0)]
    gain, low, high = paired_bootstrap_ci(pairs[0], pairs[1], seed=0)
    better = (high < 0, low > 0) if name in _LOWER_IS_BETTER else (low > 0, high < 0)
    verdict = {(True, False): "variant better", (False, True): "base better"}.get(better, "no difference shown")
    return Cell(mean, by_seed, (gain, low, high), verdict)


def write_report(config: AblateConfig, plan: Plan) -> Path:
    """Write ``report.html``, ``report.md`` and ``report.json`` from what the stages left.

    Returns:
        the path of the HTML file.
    """
    output = Path(config.output)
    scores = json.loads((output / "evaluation" / "scores.json").read_text())["scores"]
    restored = test_figures(scores, plan.results)
    table = compare({**restored, **prompt_figures(plan.results)}, config.base)
    variants = chosen_variants(config)
    tables = {t: [n for n in names if n in variants] for t, names in config.tables.items()}
    page = _environment().get_template("report.html.j2")
    facts = {
        "base": config.base,
        "titles": {name: v.title for name, v in variants.items()},
        "tables": {title: names for title, names in tables.items() if names},
        "table": table,
        "lower": _LOWER_IS_BETTER,
        "seeds": list(config.seeds),
        "images": next(iter(restored.values()))[config.base].shape[1],
    }
    write_atomic(output / "report.html", page.render(**facts, pictures=_pictures(config, plan)))
    write_atomic(output / "report.md", _environment().get_template("report.md.j2").render(**facts))
    write_json(output / "report.json", {f: {v: vars(c) for v, c in cells.items()} for f, cells in table.items()})
    return output / "report.html"


def _environment() -> Environment:
    folder = FileSystemLoader(Path(__file__).with_name("templates"))
    environment = Environment(
        loader=folder, autoescape=select_autoescape(["html.j2"]), undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters["signed"] = lambda value: f"{value:+.3f}"
    environment.filters["figure"] = lambda value: f"{value:.3f}"
    return environment


def _pictures(config: AblateConfig, plan: Plan) -> list[list[tuple[str, str]]]:
    """Rows of (label, data URI): LR, each variant with the first seed, ground truth."""
    inliner, rows = PictureInliner(_PICTURE_BYTES), []
    first = [result for result in plan.results if result.seed == config.seeds[0]]
    titles = {name: v.title for name, v in chosen_variants(config).items()}
    for path in sorted(Path(config.test_hr).glob("*.png"))[:_SHOWN]:
        truth = read_png(path)
        lr = next(p for p in sorted(Path(config.test_lr).iterdir()) if p.stem == path.stem)
        row = [("LR, bicubic", inliner.inline_bicubic(np.asarray(Image.open(lr).convert("RGB")), truth.shape[0]))]
        row += [(titles[r.variant], inliner.inline(read_png(r.restored / path.name))) for r in first]
        rows.append([*row, ("ground truth", inliner.inline(truth))])
    return rows
