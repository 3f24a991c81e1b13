"""PSNR and SSIM on the Y channel by scikit-image: an implementation that shares nothing with pyiqa."""

from __future__ import annotations

import numpy as np
from skimage import color, metrics


def psnr_of_y(image: np.ndarray, reference: np.ndarray) -> float:
    """dB of two uint8 RGB images; Y is not rounded."""
    return float(metrics.peak_signal_noise_ratio(_luma(reference), _luma(image), data_range=255))


def ssim_of_y(image: np.ndarray, reference: np.ndarray) -> float:
    """11x11 window, sigma 1.5, Y rounded, no padding; pyiqa counts a negative local similarity as 0."""
    full = metrics.structural_similarity(
        np.round(_luma(reference)),
        np.round(_luma(image)),
        data_range=255,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
        full=True,
    )[1]
    return float(np.maximum(full[5:-5, 5:-5], 0).mean())


def _luma(image: np.ndarray) -> np.ndarray:
    return color.rgb2ycbcr(image)[..., 0]
