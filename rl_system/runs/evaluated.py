"""What one held-out prompt scored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from vlcot.groups import Sample


@dataclass(frozen=True, eq=False)
class PromptFigures:
    """The figures of a held-out prompt.

    Attributes:
        row_id: row of the held-out split.
        total: mean total reward over the samples that have one.
        components: mean of each reward over the samples; None where it is absent for this image.
        psnr, ssim: mean over the samples with a final image, against the ground truth; None without any.
    """

    row_id: str
    total: float
    components: Mapping[str, float | None]
    psnr: float | None
    ssim: float | None


@dataclass(frozen=True, eq=False)
class EvaluatedPrompt(PromptFigures):
    """A held-out prompt, sampled and scored.

    Attributes:
        lr, hq: uint8 RGB, the LR image as taken and the ground truth.
        degradation: true description.
        example: the first sample.
    """

    lr: np.ndarray
    hq: np.ndarray
    degradation: str
    example: Sample
