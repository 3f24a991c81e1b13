"""The rows of the toy task: a crop of a photograph, its degraded version and all texts of the chain.

One row is one prompt of the RL run and one example of the cold start. Light on purpose: no model is loaded.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from toy.photographs import SPLIT_KEYS, Split, crop
from vlcot.degradation import SEESR_TRAINING, degrade, describe, make_target
from vlcot.images import area_downscale
from vlcot.sequence import IMAGE_PLACEHOLDER, Layout

LAYOUT = Layout(full_size=64, downsample=8, grid_unit_pixels=16)
INSTRUCTION = f"Restore step by step: {IMAGE_PLACEHOLDER}"
DEGRADATION = replace(SEESR_TRAINING, sharpen_target=False)
"""SeeSR's training values, but without sharpening: its blur kernel (51 pixels) would span the whole crop."""

_DEGRADATION_STREAM = 1
"""Keeps the seeds of the degradation apart from those of the crop, which start with the seed itself."""


@dataclass(frozen=True, eq=False)
class ToyRow:
    """One row.

    Attributes:
        row_id: split and index, e.g. ``train/000123``.
        hq: uint8 [64, 64, 3] RGB, the target of the final image.
        lr: uint8 [16, 16, 3] RGB.
        degradation, coarse, middle, fine: the true texts of the chain.
        objects: names of the visible objects, largest first, each once.
    """

    row_id: str
    hq: np.ndarray
    lr: np.ndarray
    degradation: str
    coarse: str
    middle: str
    fine: str
    objects: tuple[str, ...]

    @property
    def texts(self) -> tuple[str, str, str, str]:
        """Degradation, coarse, middle and fine text, in the order of ``SequenceBuilder.chain``."""
        return self.degradation, self.coarse, self.middle, self.fine

    def targets(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The coarse, middle and final target, uint8 [s, s, 3] at the sizes of the layout."""
        coarse, middle, full = (area_downscale(self.hq, size) for size in LAYOUT.image_sizes)
        return coarse, middle, full


def row(index: int, split: Split, seed: int = 0) -> ToyRow:
    """Row ``index`` of a split: the same arguments always give the same row.

    Raises:
        ValueError: an unknown split or a negative index.
    """
    sample = crop(index, split, seed, LAYOUT.full_size)
    hq = make_target(sample.image, DEGRADATION)
    draw = np.random.default_rng([_DEGRADATION_STREAM, seed, SPLIT_KEYS[split], index])
    lr, record = degrade(hq, DEGRADATION, int(draw.integers(2**53)))
    return ToyRow(
        row_id=f"{split}/{index:06d}",
        hq=hq,
        lr=lr,
        degradation=describe(record, DEGRADATION),
        coarse=sample.captions.coarse,
        middle=sample.captions.middle,
        fine=sample.captions.fine,
        objects=tuple(dict.fromkeys(item.name for item in sample.objects)),
    )
