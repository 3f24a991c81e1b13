"""The four rewards of RealSR-R1 as pure functions from a parsed chain and answers to [0, 1].

A reward that cannot be known (a server failed, no object was found in the LR image) is never a number:
see :data:`vlcot.groups.Score`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from vlcot.degradation.text import fraction_correct
from vlcot.groups import Absent, Failed, Score, Scored
from vlcot.sequence import ParsedChain

COMPONENTS = ("format", "degradation", "understanding", "generation")
EXPERT_SCALE = 10.0
"""Upper end of each score that the visual expert gives."""

METRIC_EXPERTS = MappingProxyType(
    {
        "perceptual": ("LPIPS", "DISTS", "PSNR", "SSIM"),
        "generative": ("MUSIQ", "MANIQA", "CLIPIQA", "TOPIQ"),
    }
)
"""The paper's ablation of the visual expert: the metrics that take its place."""

METRIC_RANGES = MappingProxyType(
    {
        "PSNR": (0.0, 50.0),
        "SSIM": (0.0, 1.0),
        "LPIPS": (1.0, 0.0),
        "DISTS": (1.0, 0.0),
        "MUSIQ": (0.0, 100.0),
        "MANIQA": (0.0, 1.0),
        "CLIPIQA": (0.0, 1.0),
        "TOPIQ": (0.0, 1.0),
    }
)
"""Metric -> the value that counts as 0 and the value that counts as 1; see :func:`metrics_reward`."""


@dataclass(frozen=True)
class RewardWeights:
    """Weights of the sum; the paper adds the four rewards (all 1). ``extra``: further rewards, by name."""

    format: float = 1.0
    degradation: float = 1.0
    understanding: float = 1.0
    generation: float = 1.0
    extra: Mapping[str, float] = field(default_factory=dict)

    def of(self, name: str) -> float:
        """Weight of one reward. Raises KeyError for one that there is not."""
        return float(getattr(self, name)) if name in COMPONENTS else self.extra[name]


@dataclass(frozen=True)
class ExpertWeights:
    """Weights of the visual expert's three scores; they must sum to 1."""

    quality: float = 0.4
    realism: float = 0.3
    consistency: float = 0.3

    def __post_init__(self) -> None:
        total = self.quality + self.realism + self.consistency
        if abs(total - 1.0) > 1e-6 or min(self.quality, self.realism, self.consistency) < 0:
            raise ValueError(f"expert weights must be non-negative and sum to 1, they sum to {total:g}")


def format_reward(chain: ParsedChain) -> Scored:
    """1 if the chain is well-formed (:attr:`ParsedChain.well_formed`), else 0."""
    return Scored(1.0 if chain.well_formed else 0.0, {"errors": list(chain.errors)})


def degradation_reward(chain: ParsedChain, truth: str) -> Scored:
    """n_correct / n_total over the components of the description (paper, degradation reward)."""
    return Scored(fraction_correct(chain.degradation or "", truth))


def understanding_reward(coarse: str | None, objects: Sequence[str]) -> Scored | Absent:
    """Share of the main objects that the coarse text names, as whole words, simple plurals included.

    Args:
        coarse: the coarse description, None where the chain has none (scores 0).
        objects: names of the main objects in the LR image; without any the component is absent.
    """
    names = list(dict.fromkeys(name.strip().lower() for name in objects if name.strip()))
    if not names:
        return Absent("no main object was found in the LR image")
    text = (coarse or "").lower()
    named = [name for name in names if _names(text, name)]
    return Scored(len(named) / len(names), {"objects": names, "named": named})


def generation_reward(scores: Mapping[str, float], weights: ExpertWeights) -> Scored:
    """Weighted sum of the expert's quality, realism and consistency (0..10 each), scaled to [0, 1]."""
    parts = {name: float(scores[name]) / EXPERT_SCALE for name in ("quality", "realism", "consistency")}
    value = sum(getattr(weights, name) * part for name, part in parts.items())
    return Scored(value, {name: float(scores[name]) for name in parts})


def metrics_reward(values: Mapping[str, float]) -> Scored:
    """Mean over the metrics, each mapped linearly onto [0, 1] by :data:`METRIC_RANGES` and cut off there.

    The paper names the metrics of its two ablation experts and not how they become a reward. For ``generative`` this
    is what the authors' released code does (MUSIQ / 100, the others as they are, the mean of the four). ``perceptual``
    follows it: LPIPS and DISTS count as one minus their value, and PSNR is divided by 50 dB, the most that matters in
    8 bits (images that differ by one grey level everywhere have 48 dB); no metric is weighted.

    Args:
        values: metric name -> value; the detail of the result.

    Raises:
        ValueError: no metric, one without a range, or a value that is not finite.
    """
    if not values:
        raise ValueError("a reward needs at least one metric")
    parts = []
    for name, value in values.items():
        if name not in METRIC_RANGES:
            raise ValueError(f"{name} has no range; there are {', '.join(METRIC_RANGES)}")
        if not math.isfinite(value):
            raise ValueError(f"{name} is {value}; a reward needs a finite value")
        worst, best = METRIC_RANGES[name]
        parts.append(min(1.0, max(0.0, (value - worst) / (best - worst))))
    return Scored(math.fsum(parts) / len(parts), dict(values))


def component_names(seen: Iterable[str] = ()) -> tuple[str, ...]:
    """The four components, then whatever else was ``seen``: rewards of the user's own."""
    return tuple(dict.fromkeys((*COMPONENTS, *seen)))


def total_reward(scores: Mapping[str, Score], weights: RewardWeights) -> float | None:
    """Weighted sum over the components that are present; None if one failed (the sample has no reward)."""
    if any(isinstance(score, Failed) for score in scores.values()):
        return None
    return sum(weights.of(n) * s.value for n, s in scores.items() if isinstance(s, Scored))


def _names(text: str, name: str) -> bool:
    last = name.split()[-1]
    plurals = [name + "s", name + "es"]
    if re.search(r"[^aeiou]y$", last):
        plurals.append(name[:-1] + "ies")
    if last.endswith("man"):
        plurals.append(name[:-3] + "men")
    if last.endswith("fe"):
        plurals.append(name[:-2] + "ves")
    elif last.endswith("f"):
        plurals.append(name[:-1] + "ves")
    return any(re.search(rf"(?<!\w){re.escape(form)}(?!\w)", text) for form in (name, *plurals))
