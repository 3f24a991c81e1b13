"""PSNR and SSIM as the paper computes them."""

from __future__ import annotations

import numpy as np
import pytest
from skimage import color, data, metrics

from vlcot.metrics import psnr, ssim

pytestmark = pytest.mark.unit


def _pair() -> tuple[np.ndarray, np.ndarray]:
    image = data.astronaut()[100:228, 150:278]
    noise = np.random.default_rng(0).normal(0, 12, image.shape)
    return np.clip(image + noise, 0, 255).astype(np.uint8), image


def _luma(image: np.ndarray) -> np.ndarray:
    return color.rgb2ycbcr(image)[..., 0]


def test_psnr_equals_scikit_image_on_the_y_channel():
    noisy, clean = _pair()
    expected = metrics.peak_signal_noise_ratio(_luma(clean), _luma(noisy), data_range=255)
    assert psnr(noisy, clean) == pytest.approx(expected, abs=1e-2)


def test_ssim_equals_scikit_image_on_the_rounded_y_channel():
    noisy, clean = _pair()
    full = metrics.structural_similarity(
        np.round(_luma(clean)),
        np.round(_luma(noisy)),
        data_range=255,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
        full=True,
    )[1]
    assert ssim(noisy, clean) == pytest.approx(full[5:-5, 5:-5].mean(), abs=1e-3)


def test_images_of_different_shape_are_refused():
    noisy, clean = _pair()
    with pytest.raises(ValueError, match="one shape"):
        psnr(noisy[:64], clean)
