"""The single steps of the degradation. All take and return RGB float32 (height, width, 3) in [0, 1].

Bits are equal for equal inputs on one machine; another CPU or library build may round differently.
"""

from __future__ import annotations

import io

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

RESIZE_MODES = ("area", "bilinear", "bicubic")

_GRAY_WEIGHTS = np.array([0.2989, 0.587, 0.114])
"""ITU-R BT.601 luma as torchvision's ``rgb_to_grayscale`` rounds it."""


def filter2d(image: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """Correlate each channel with ``kernel`` (k, k); reflect-101 border, repeated where k/2 exceeds the image."""
    return cv2.filter2D(image, -1, kernel, borderType=cv2.BORDER_REFLECT_101)


def rescale(image: np.ndarray, factor: float, mode: str) -> np.ndarray:
    """Resize to floor(side * factor), at least 1 pixel.

    As in Real-ESRGAN the sampling grid has the step 1/factor, not the ratio of the sizes, so what the floor
    cuts off is lost at the right and lower edge (less than 1/factor pixels). ``area`` averages over the whole.
    """
    height, width = image.shape[:2]
    if min(int(height * factor), int(width * factor)) < 1:
        return resize(image, max(1, int(height * factor)), max(1, int(width * factor)), mode)
    return _interpolate(image, mode, factor=factor)


def resize(image: np.ndarray, height: int, width: int, mode: str) -> np.ndarray:
    """Resize to (height, width). ``bicubic`` (a = -0.75) may leave [0, 1]; no mode antialiases, as in the source."""
    return _interpolate(image, mode, size=(height, width))


def _interpolate(
    image: np.ndarray, mode: str, size: tuple[int, int] | None = None, factor: float | None = None
) -> np.ndarray:
    if mode not in RESIZE_MODES:
        raise ValueError(f"unknown resize mode {mode!r}: allowed are {RESIZE_MODES}")
    batch = torch.from_numpy(image).permute(2, 0, 1)[None]
    resized = F.interpolate(batch, size=size, scale_factor=factor, mode=mode)
    return np.ascontiguousarray(resized[0].permute(1, 2, 0).numpy())


def add_gaussian_noise(image: np.ndarray, sigma: float, gray: bool, rng: np.random.Generator) -> np.ndarray:
    """Add white noise of standard deviation ``sigma`` / 255, the same in all channels if ``gray``, and clip."""
    height, width, channels = image.shape
    noise = rng.standard_normal((height, width, 1 if gray else channels), dtype=np.float32)
    return np.clip(image + noise * np.float32(sigma / 255.0), 0.0, 1.0)


def add_poisson_noise(image: np.ndarray, scale: float, gray: bool, rng: np.random.Generator) -> np.ndarray:
    """Add ``scale`` times the shot noise of the image (of its luma if ``gray``), and clip.

    The count of photons at full brightness is the number of different 8-bit values, rounded up to a power of 2.
    """
    levels = to_uint8(image)
    if gray:
        levels = np.rint(levels @ _GRAY_WEIGHTS).astype(np.uint8)[..., None]
    photons = 2.0 ** np.ceil(np.log2(np.unique(levels).size))
    light = levels / 255.0
    noise = rng.poisson(light * photons) / photons - light
    return np.clip(image + (noise * scale).astype(np.float32), 0.0, 1.0)


def jpeg(image: np.ndarray, quality: int) -> np.ndarray:
    """Round to 8 bit, compress as JPEG (4:2:0, ``quality`` 1..100) and decode."""
    file = io.BytesIO()
    Image.fromarray(to_uint8(image)).save(file, "JPEG", quality=quality, subsampling="4:2:0")
    return to_float(np.asarray(Image.open(file)))


def usm_sharpen(image: np.ndarray) -> np.ndarray:
    """Unsharp masking of the target, as in Real-ESRGAN: weight 0.5 where the detail exceeds 10/255, soft mask.

    The blur has 51x51 pixels and sigma 8, which is what OpenCV derives from 51.
    """
    detail = image - _wide_blur(image)
    mask = _wide_blur((np.abs(detail) * 255.0 > 10.0).astype(np.float32))
    sharp = np.clip(image + 0.5 * detail, 0.0, 1.0)
    return mask * sharp + (1.0 - mask) * image


def _wide_blur(image: np.ndarray) -> np.ndarray:
    return cv2.GaussianBlur(image, (51, 51), 8.0, borderType=cv2.BORDER_REFLECT_101)


def to_uint8(image: np.ndarray) -> np.ndarray:
    """Clip to [0, 1] and round to 0..255."""
    return np.rint(np.clip(image, 0.0, 1.0) * 255.0).astype(np.uint8)


def to_float(image: np.ndarray) -> np.ndarray:
    """uint8 to float32 in [0, 1]."""
    return image.astype(np.float32) / np.float32(255.0)
