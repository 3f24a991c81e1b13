"""What a run achieved, on held-out prompts, before against after."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rl_system.runs.directory import RunDirectory
from rl_system.runs.evaluated import PromptFigures
from rl_system.runs.files import write_json
from vlcot.rewards import component_names


def paired_bootstrap_ci(
    before: Sequence[float], after: Sequence[float], seed: int, resamples: int = 10_000, level: float = 0.95
) -> tuple[float, float, float]:
    """Gain and its percentile interval when the prompts are drawn again with replacement.

    Args:
        before, after: [N] results of the same prompts in the same order.

    Returns:
        mean of ``after - before``, lower and upper end of the ``level`` interval.

    Raises:
        ValueError: lengths differ, no prompt, or a value that is not finite.
    """
    gains = np.asarray(after, dtype=np.float64) - np.asarray(before, dtype=np.float64)
    if len(before) != len(after) or not len(gains):
        raise ValueError(f"the interval needs the same prompts both times, got {len(before)} and {len(after)}")
    if not np.isfinite(gains).all():
        raise ValueError("the interval needs finite values")
    drawn = np.random.default_rng(seed).integers(len(gains), size=(resamples, len(gains)))
    tail = (1 - level) / 2
    low, high = np.quantile(gains[drawn].mean(axis=1), [tail, 1 - tail])
    return float(gains.mean()), float(low), float(high)


def build_summary(
    before: Sequence[PromptFigures],
    after: Sequence[PromptFigures],
    *,
    seed: int,
    kl_final: float | None,
    steps: int,
    groups_trained: int,
    groups_reused: int,
    wall_s: float,
    max_staleness_seen: float,
    engines: Mapping[str, Any],
    weight_checksum_match: bool,
) -> dict[str, Any]:
    """The figures of ``summary.json``.

    PSNR and SSIM are means over the prompts that have a final image both times, None if there is none;
    a reward that is absent on every prompt is None.

    Raises:
        ValueError: the evaluations are of different prompts, or a figure is not finite (it is named).
    """
    if [p.row_id for p in before] != [p.row_id for p in after]:
        raise ValueError("the evaluations before and after must be of the same prompts in the same order")
    gain, low, high = paired_bootstrap_ci([p.total for p in before], [p.total for p in after], seed)
    restored = [(b, a) for b, a in zip(before, after, strict=True) if None not in (b.psnr, a.psnr, b.ssim, a.ssim)]
    names = component_names(before[0].components)
    summary: dict[str, Any] = {
        "reward_before": _mean([p.total for p in before]),
        "reward_after": _mean([p.total for p in after]),
        "reward_gain": gain,
        "reward_gain_ci95": [low, high],
        "rewards_before": {name: _mean([p.components[name] for p in before]) for name in names},
        "rewards_after": {name: _mean([p.components[name] for p in after]) for name in names},
        "psnr_before": _mean([b.psnr for b, _ in restored]),
        "psnr_after": _mean([a.psnr for _, a in restored]),
        "ssim_before": _mean([b.ssim for b, _ in restored]),
        "ssim_after": _mean([a.ssim for _, a in restored]),
        "prompts": len(before),
        "kl_final": kl_final,
        "steps": int(steps),
        "groups_trained": int(groups_trained),
        "groups_reused": int(groups_reused),
        "wall_s": float(wall_s),
        "max_staleness_seen": int(max_staleness_seen),
        "engines": dict(engines),
        "weight_checksum_match": bool(weight_checksum_match),
    }
    _refuse_nonfinite(summary)
    return summary


def write_summary(run: RunDirectory, summary: Mapping[str, Any]) -> None:
    """Write ``summary.json``. ValueError if a figure is not finite."""
    _refuse_nonfinite(summary)
    write_json(run.summary, dict(summary))


def read_summary(run: RunDirectory) -> dict[str, Any] | None:
    """What :func:`write_summary` wrote, None if it has not."""
    summary: dict[str, Any] | None = json.loads(run.summary.read_text()) if run.summary.exists() else None
    return summary


def _mean(values: Sequence[float | None]) -> float | None:
    present = [value for value in values if value is not None]
    return float(np.mean(present)) if present else None


def _refuse_nonfinite(summary: Mapping[str, Any], prefix: str = "") -> None:
    for key, value in summary.items():
        if isinstance(value, Mapping):
            _refuse_nonfinite(value, f"{prefix}{key}.")
            continue
        figures = value if isinstance(value, list) else [value]
        if any(isinstance(figure, float) and not math.isfinite(figure) for figure in figures):
            raise ValueError(f"summary: {prefix}{key} is {value}; every figure must be finite")
