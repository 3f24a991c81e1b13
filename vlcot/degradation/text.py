"""A degradation in words, and how many of the words a model got right.

The paper gives three uniform intervals "light", "medium", "heavy" and a bracketed list; its list of components
and its numbers are unpublished. The rules here are this project's:

- Both stages, in the order they are applied; per stage blur, resize, noise, compression. "; " between the
  stages, ", " between the components. The last resize, the last sinc filter and the place of the last JPEG
  are not described.
- A level is the third of the parameter's range in the config: [low, edge1), [edge1, edge2), [edge2, high].
- Blur: by sigma, for two sigmas by their geometric mean. A sinc kernel has no sigma: "ringing blur". A skipped
  blur: "no blur".
- Resize: "upscale", "no resize", or a downscale by the thirds of (low, 1); a smaller factor is heavier. In stage
  2 the factor counts from the LR size.
- Noise: its kind, with the level by that kind's own range. Gray or colour is not described.
- Compression: by JPEG quality; lower is heavier.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from vlcot.degradation.config import DegradationConfig, StageConfig
from vlcot.degradation.kernels import SINC, BlurKernel, effective_sigma
from vlcot.degradation.record import DOWN, GAUSSIAN, POISSON, UP, DegradationRecord, Noise, Resize, Stage

LEVELS = ("light", "medium", "heavy")
COMPONENT_COUNT = 8

NO_BLUR, RINGING_BLUR, UPSCALE, NO_RESIZE = "no blur", "ringing blur", "upscale", "no resize"

_BRACKETED = re.compile(r"\[([^\[\]]*)\]")
_SEPARATOR = re.compile(r"[,;]")


def describe(record: DegradationRecord, config: DegradationConfig) -> str:
    """The text inside the ``<degradation>`` block, e.g. ``[medium blur, heavy downscale, light gaussian noise,
    heavy compression; no blur, upscale, medium poisson noise, light compression]``.

    ``config`` is the one the record was drawn from: it gives the ranges.
    """
    stages = (
        _describe_stage(record.stage1, config.stage1),
        _describe_stage(record.stage2, config.stage2),
    )
    return f"[{'; '.join(', '.join(stage) for stage in stages)}]"


def vocabulary(config: DegradationConfig) -> list[tuple[str, ...]]:
    """Per position, every phrase that :func:`describe` can give for records of ``config``."""
    return [phrases for stage in (config.stage1, config.stage2) for phrases in _stage_vocabulary(stage)]


def components(text: str) -> tuple[str, ...] | None:
    """The components of the first bracketed list in ``text``; None without one. Never raises.

    Lower case, single spaces; "," and ";" separate alike; an empty component keeps its position.
    """
    found = _BRACKETED.search(text)
    if found is None:
        return None
    parts = tuple(" ".join(part.lower().split()) for part in _SEPARATOR.split(found[1]))
    return () if parts == ("",) else parts


def fraction_correct(text: str, truth_text: str) -> float:
    """The paper's degradation reward n_correct / n_total, in [0, 1], position by position.

    A missing component is wrong; a surplus one counts in n_total, so listing everything does not pay. A text
    without a bracketed list has every component wrong.

    Raises:
        ValueError: ``truth_text`` is not a description of 8 components.
    """
    truth = components(truth_text)
    if truth is None or len(truth) != COMPONENT_COUNT:
        raise ValueError(f"the true description must list {COMPONENT_COUNT} components, got {truth_text!r}")
    guess = components(text) or ()
    correct = sum(said == true for said, true in zip(guess, truth, strict=False))
    return correct / max(len(guess), len(truth))


def third_edges(bounds: Sequence[float]) -> tuple[float, float]:
    """The two edges that cut ``bounds`` (low, high) into uniform thirds."""
    low, high = bounds
    return low + (high - low) / 3, low + (high - low) * 2 / 3


def _level(value: float, bounds: Sequence[float], low_is_heavy: bool = False) -> str:
    third = sum(value >= edge for edge in third_edges(bounds))
    return LEVELS[2 - third if low_is_heavy else third]


def _describe_stage(stage: Stage, config: StageConfig) -> tuple[str, str, str, str]:
    compression = _level(stage.jpeg_quality, config.jpeg_quality_range, low_is_heavy=True)
    return (
        _describe_blur(stage.blur, config),
        _describe_resize(stage.resize, config),
        _describe_noise(stage.noise, config),
        f"{compression} compression",
    )


def _describe_blur(kernel: BlurKernel | None, config: StageConfig) -> str:
    if kernel is None:
        return NO_BLUR
    if kernel.kind == SINC:
        return RINGING_BLUR
    return f"{_level(effective_sigma(kernel), config.sigma_range)} blur"


def _describe_resize(resize: Resize, config: StageConfig) -> str:
    if resize.direction == UP:
        return UPSCALE
    if resize.direction == DOWN:
        return f"{_level(resize.factor, (config.resize_range[0], 1.0), low_is_heavy=True)} downscale"
    return NO_RESIZE


def _describe_noise(noise: Noise, config: StageConfig) -> str:
    bounds = config.gaussian_sigma_range if noise.kind == GAUSSIAN else config.poisson_scale_range
    return f"{_level(noise.level, bounds)} {noise.kind} noise"


def _stage_vocabulary(stage: StageConfig) -> tuple[tuple[str, ...], ...]:
    up, down, keep = stage.resize_probs
    blurred, gaussian = stage.blur_prob, stage.gaussian_noise_prob
    return (
        (
            *_levels("blur", blurred * (1 - stage.sinc_prob)),
            *_if_possible(RINGING_BLUR, blurred * stage.sinc_prob),
            *_if_possible(NO_BLUR, 1 - blurred),
        ),
        (*_levels("downscale", down), *_if_possible(UPSCALE, up), *_if_possible(NO_RESIZE, keep)),
        (*_levels(f"{GAUSSIAN} noise", gaussian), *_levels(f"{POISSON} noise", 1 - gaussian)),
        _levels("compression", 1.0),
    )


def _levels(thing: str, probability: float) -> tuple[str, ...]:
    return tuple(f"{level} {thing}" for level in LEVELS) if probability > 0 else ()


def _if_possible(phrase: str, probability: float) -> tuple[str, ...]:
    return (phrase,) if probability > 0 else ()
