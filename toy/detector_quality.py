"""How good the toy detector is on held-out images: recall and precision of named boxes, and of names alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from reward_servers.grounded_sam import Boxes, Detector
from toy.detection_examples import Example, crop_examples, degraded, scene_examples
from toy.photographs import Box

HELDOUT_SEED = 1_000_000
"""Of the degradation of held-out images; training draws its seeds at random from below 2**31."""


@dataclass(frozen=True)
class Score:
    """Recall and precision in [0, 1], and the number of true items they rest on."""

    recall: float
    precision: float
    count: int


@dataclass(frozen=True)
class Quality:
    """``boxes``: right name and IoU of at least 0.5. ``names``: the set of names of an image, wherever they are."""

    boxes: Score
    names: Score


def heldout_sets(scenes: int = 256, crops: int = 512) -> dict[str, list[Example]]:
    """Held-out images by kind."""
    composed, real = scene_examples(scenes, "heldout"), crop_examples(crops, "heldout")
    return {
        "composed scenes": composed,
        "composed scenes, degraded": degraded(composed, HELDOUT_SEED),
        "real crops": real,
        "real crops, degraded": degraded(real, HELDOUT_SEED),
    }


def quality(detector: Detector, examples: Sequence[Example], batch_size: int = 32) -> Quality:
    """Scores of the detector as it is served."""
    box_hits = box_found = name_hits = name_found = 0
    for start in range(0, len(examples), batch_size):
        batch = examples[start : start + batch_size]
        for found, truth in zip(detector.detect([e.image for e in batch]), batch, strict=True):
            box_hits += matches(found, truth)
            box_found += len(found.names)
            name_hits += len(set(found.names) & set(truth.names))
            name_found += len(set(found.names))
    boxes, names = sum(len(e.names) for e in examples), sum(len(set(e.names)) for e in examples)
    return Quality(_score(box_hits, box_found, boxes), _score(name_hits, name_found, names))


def matches(found: Boxes, truth: Example, iou: float = 0.5) -> int:
    """Detections that have the name of a true object and its place; every object is matched once, best score first."""
    left = list(zip(truth.names, truth.boxes, strict=True))
    hits = 0
    for name, box in zip(found.names, found.boxes.tolist(), strict=True):
        overlaps = [(_iou(box, place), i) for i, (true_name, place) in enumerate(left) if true_name == name]
        if overlaps and max(overlaps)[0] >= iou:
            left.pop(max(overlaps)[1])
            hits += 1
    return hits


def _score(hits: int, found: int, count: int) -> Score:
    return Score(hits / max(count, 1), hits / max(found, 1), count)


def _iou(a: Box, b: Box) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    overlap = max(width, 0.0) * max(height, 0.0)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - overlap
    return overlap / union if union > 0 else 0.0
