"""Colour alignment against the peers' own formulation of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from vlcot import colour

pytestmark = pytest.mark.unit


@pytest.fixture
def pair():
    rng = np.random.default_rng(0)
    return rng.random((40, 56, 3)), 0.2 + 0.5 * rng.random((40, 56, 3))


def decomposed(image: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """High and low frequencies as ``wavelet_color_fix.py`` computes them: five dilated 3x3 convolutions."""
    low = torch.from_numpy(image).permute(2, 0, 1)[None]
    kernel = torch.tensor([[1.0, 2, 1], [2, 4, 2], [1, 2, 1]], dtype=torch.float64)[None, None].repeat(3, 1, 1, 1) / 16
    high = torch.zeros_like(low)
    for level in range(5):
        radius = 2**level
        padded = F.pad(low, (radius,) * 4, mode="replicate")
        blurred = F.conv2d(padded, kernel, groups=3, dilation=radius)
        high += low - blurred
        low = blurred
    return high, low


def test_wavelet_is_the_peers_sum_of_bands(pair):
    image, reference = pair
    expected = (decomposed(image)[0] + decomposed(reference)[1]).clamp(0, 1)[0].permute(1, 2, 0).numpy()
    np.testing.assert_allclose(colour.wavelet(image, reference), expected, atol=1e-12)


def test_adain_is_the_peers_with_the_unbiased_variance(pair):
    image, reference = (torch.from_numpy(p).permute(2, 0, 1).reshape(3, -1) for p in pair)
    normal = (image - image.mean(1, keepdim=True)) / (image.var(1, keepdim=True) + 1e-5).sqrt()
    expected = normal * (reference.var(1, keepdim=True) + 1e-5).sqrt() + reference.mean(1, keepdim=True)
    expected = expected.clamp(0, 1).reshape(3, 40, 56).permute(1, 2, 0).numpy()
    np.testing.assert_allclose(colour.adain(*pair), expected, atol=1e-12)


def test_what_is_aligned_already_stays(pair):
    for align in colour.ALIGNMENTS.values():
        np.testing.assert_allclose(align(pair[0], pair[0]), pair[0], atol=1e-12)


def test_wavelet_takes_a_colour_cast_away_and_keeps_detail(pair):
    reference = pair[1]
    cast = reference + np.array([0.2, -0.1, 0.05])
    np.testing.assert_allclose(colour.wavelet(cast, reference), reference, atol=1e-12)


def test_other_shapes_are_refused(pair):
    image, reference = pair
    for align in colour.ALIGNMENTS.values():
        with pytest.raises(ValueError, match="one size"):
            align(image, reference[:-1])
        with pytest.raises(ValueError, match=r"\[H, W, 3\]"):
            align(image[..., 0], reference[..., 0])
    with pytest.raises(ValueError, match="single pixel"):
        colour.adain(image[:1, :1], reference[:1, :1])
