"""Colour alignment: a restored image takes the colours of the bicubic LR image.

Both formulas are those of ``wavelet_color_fix.py`` (sd-webui-stablesr, used alike by SeeSR, OSEDiff and PURE).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np

LEVELS = 5
"""Blurs of the wavelet alignment, with the kernel [1 2 1; 2 4 2; 1 2 1] / 16 dilated by 1, 2, 4, 8, 16."""
VARIANCE_EPSILON = 1e-5


def wavelet(image: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """High frequencies of ``image`` on the low frequencies of ``reference``, both float [H, W, 3] in [0, 1].

    The bands of the peers' decomposition telescope: the high ones sum to the image minus its last blur.

    Raises:
        ValueError: shapes differ, or are not [H, W, 3].
    """
    _check(image, reference)
    return np.clip(image + low_frequencies(reference - image), 0.0, 1.0)


def adain(image: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """``image`` with the mean and standard deviation of each channel of ``reference``; float [H, W, 3] in [0, 1].

    The variance is the unbiased one plus :data:`VARIANCE_EPSILON`.

    Raises:
        ValueError: shapes differ, are not [H, W, 3], or have a single pixel.
    """
    _check(image, reference)
    if image.shape[0] * image.shape[1] < 2:
        raise ValueError("a single pixel has no variance")
    mean, deviation = _statistics(image)
    wanted_mean, wanted_deviation = _statistics(reference)
    return np.clip((image - mean) / deviation * wanted_deviation + wanted_mean, 0.0, 1.0)


ALIGNMENTS: Mapping[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = MappingProxyType(
    {"wavelet": wavelet, "adain": adain}
)
"""By the name that the peers' ``--align_method`` has for it."""


def low_frequencies(image: np.ndarray) -> np.ndarray:
    """float [H, W, C] after :data:`LEVELS` blurs, edges repeated. The 3x3 kernel is [1 2 1] / 4 along each axis."""
    for level in range(LEVELS):
        for axis in (0, 1):
            image = _blur(image, 2**level, axis)
    return image


def _blur(image: np.ndarray, step: int, axis: int) -> np.ndarray:
    length = image.shape[axis]
    margins = [(step, step) if a == axis else (0, 0) for a in range(image.ndim)]
    padded = np.moveaxis(np.pad(image, margins, mode="edge"), axis, 0)
    before, after = padded[:length], padded[2 * step :]
    return np.moveaxis(0.25 * before + 0.5 * padded[step : step + length] + 0.25 * after, 0, axis)


def _statistics(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    pixels = image.reshape(-1, image.shape[2]).astype(np.float64)
    return pixels.mean(axis=0), np.sqrt(pixels.var(axis=0, ddof=1) + VARIANCE_EPSILON)


def _check(image: np.ndarray, reference: np.ndarray) -> None:
    if image.ndim != 3 or image.shape[2] != 3 or image.shape != reference.shape:
        raise ValueError(f"both images must be [H, W, 3] of one size, got {image.shape} and {reference.shape}")
