"""What a reward server is asked and what it answers. Images are uint8 [H, W, 3] RGB arrays, never re-encoded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class DetectedObject:
    """One object in an image.

    Attributes:
        name: label, lower case.
        score: detection confidence in [0, 1].
        box: x0, y0, x1, y1 in pixels of the image that was sent.
        mask_area: share of the image that the mask covers, in [0, 1].
        mask: bool [H, W], only where masks were asked for.
    """

    name: str
    score: float
    box: tuple[float, float, float, float]
    mask_area: float
    mask: np.ndarray | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class Detection:
    """Answer of ``grounded_sam``: every object kept after NMS, and the names of the main ones."""

    objects: tuple[DetectedObject, ...]
    main: tuple[str, ...]


@dataclass(frozen=True)
class Judgement:
    """The visual expert's scores of one image of a group, 0 (worst) to 10 (best), and its reason in a few words."""

    quality: float
    realism: float
    consistency: float
    rationale: str = ""


@dataclass(frozen=True)
class Captions:
    """Three descriptions of an image, each with more detail than the one before."""

    coarse: str
    middle: str
    fine: str


@dataclass(frozen=True)
class Tags:
    """Names of the objects in an image, lower case, the most important one first."""

    names: tuple[str, ...]


@dataclass(frozen=True)
class Measurement:
    """Metrics of the images of one request: metric name -> one finite value per image, in their order."""

    values: Mapping[str, tuple[float, ...]]


class RewardServerError(RuntimeError):
    """A server could not give a usable answer; the message says why."""


class OverloadedError(RewardServerError):
    """A server's queue is full; it is worth asking again later."""
