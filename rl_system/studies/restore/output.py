"""What is written of a restored picture: results, steps, comparison."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from rl_system.runs.files import write_json
from rl_system.runs.pictures import write_png
from rl_system.studies.restore.files import Job
from rl_system.studies.restore.images import Photograph, to_bits, write_photograph
from rl_system.studies.restore.pictures import OpenPicture
from vlcot.groups import Sample

GAP = 4
"""White pixels between the pictures of a strip."""


def write_results(job: Job, results: Sequence[Photograph]) -> list[str]:
    """Write each; paths. OSError: cannot be written."""
    paths = job.results(len(results))
    for path, result in zip(paths, results, strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_photograph(path, result)
    return [str(path) for path in paths]


def write_steps(job: Job, picture: OpenPicture, kept: Sequence[int]) -> None:
    """Coarse and middle image of each kept sample, and ``chains.json``: what the policy wrote of each tile."""
    job.steps.mkdir(parents=True, exist_ok=True)
    for number in kept:
        for stage in picture.drawing.steps:
            prefix = "" if len(kept) == 1 else f"{number + 1}_"
            write_png(job.steps / f"{prefix}{stage}.png", picture.step(number, stage))
    tiles = []
    for index, (top, left) in enumerate(picture.plan.corners):
        chains = [_chain(number, picture.chains[index][number]) for number in kept]
        tiles.append({"top": top, "left": left, "side": picture.plan.side, "chains": chains})
    canvas = {"height": picture.plan.height, "width": picture.plan.width}
    source = str(job.source).encode("utf-8", "backslashreplace").decode()  # names need not be UTF-8
    write_json(job.steps / "chains.json", {"source": source, "canvas": canvas, "tiles": tiles})


def write_strip(job: Job, picture: OpenPicture, results: Sequence[Photograph]) -> None:
    """The bicubic enlargement and each result in one picture: side by side, wide ones below each other."""
    job.strip.parent.mkdir(parents=True, exist_ok=True)
    shown = [picture.bicubic(), *(as_rgb(result) for result in results)]
    height, width = shown[0].shape[:2]
    axis = 0 if width > 2 * height else 1
    gap = np.full((GAP, width, 3) if axis == 0 else (height, GAP, 3), 255, np.uint8)
    parts = [part for image in shown for part in (gap, image)][1:]
    write_png(job.strip, np.concatenate(parts, axis=axis))


def as_rgb(photograph: Photograph) -> np.ndarray:
    """uint8 [H, W, 3], without alpha."""
    colour = photograph.colour
    return colour if colour.dtype == np.uint8 else to_bits(colour / 65535.0, 8)


def _chain(number: int, sample: Sample) -> dict[str, Any]:
    degradation, coarse, middle, fine = sample.chain.texts
    return {
        "sample": number + 1,
        "degradation": degradation,
        "coarse": coarse,
        "middle": middle,
        "final": fine,
        "tokens": len(sample.ids),
    }
