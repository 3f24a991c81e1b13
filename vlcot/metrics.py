"""Full-reference metrics of the paper's tables through pyiqa.

PSNR and SSIM are on the Y channel of YCbCr (ITU-R BT.601, 16..235), no border cropped, as OSEDiff's
``test_metrics.py`` calls them; without ``color_space`` pyiqa's Y is full-range and PSNR 1.32 dB lower.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import pyiqa
import torch


@cache
def _metric(name: str) -> torch.nn.Module:
    return pyiqa.create_metric(name, test_y_channel=True, color_space="ycbcr", device="cpu")


def psnr(image: np.ndarray, reference: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of two uint8 [H, W, 3] RGB images.

    Raises:
        ValueError: shapes or dtypes differ.
    """
    return _full_reference("psnr", image, reference)


def ssim(image: np.ndarray, reference: np.ndarray) -> float:
    """Structural similarity (11x11 window, sigma 1.5) of two uint8 [H, W, 3] RGB images.

    Raises:
        ValueError: shapes or dtypes differ.
    """
    return _full_reference("ssim", image, reference)


def _full_reference(name: str, image: np.ndarray, reference: np.ndarray) -> float:
    if image.shape != reference.shape or image.dtype != np.uint8 or reference.dtype != np.uint8:
        raise ValueError(
            f"{name} needs two uint8 images of one shape, got {image.shape} {image.dtype} "
            f"and {reference.shape} {reference.dtype}"
        )
    batch = [torch.from_numpy(i.copy()).permute(2, 0, 1)[None].float() / 255 for i in (image, reference)]
    return float(_metric(name)(*batch))
