"""The two resizes that every part must do alike."""

from __future__ import annotations

import numpy as np
from PIL import Image


def upscale_for_policy(lr: np.ndarray, size: int) -> np.ndarray:
    """The LR image as the policy sees it: Pillow's bicubic at the restored size (PURE and RealSR-R1 do the same).

    Args:
        lr: uint8 [h, w, 3] RGB.
        size: side of the result in pixels.

    Returns:
        uint8 [size, size, 3].

    Raises:
        ValueError: ``lr`` is not uint8 RGB or not square.
    """
    _check_square(lr)
    return np.array(Image.fromarray(lr).resize((size, size), Image.Resampling.BICUBIC))


def area_downscale(image: np.ndarray, size: int) -> np.ndarray:
    """Mean over blocks of pixels, rounded to 8 bit: how the coarse and the middle target are made.

    Args:
        image: uint8 [h, w, 3] RGB.
        size: side of the result; divides the side of ``image``.

    Returns:
        uint8 [size, size, 3].

    Raises:
        ValueError: ``image`` is not uint8 RGB, not square, or its side is no multiple of ``size``.
    """
    _check_square(image)
    side = image.shape[0]
    if size < 1 or side % size:
        raise ValueError(f"an image of side {side} has no area downscale to {size}: {side} is not a multiple")
    block = side // size
    means = image.reshape(size, block, size, block, 3).mean(axis=(1, 3), dtype=np.float64)
    return np.rint(means).astype(np.uint8)


def _check_square(image: np.ndarray) -> None:
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or image.shape[0] != image.shape[1]:
        raise ValueError(f"expected a square uint8 RGB image [n, n, 3], got {image.dtype} of shape {image.shape}")
