"""Blur kernels against their formulas, evaluated point by point with the standard library."""

from math import atan2, cos, exp, hypot, pi, sin

import numpy as np
import pytest

from vlcot.degradation.config import SEESR_TRAINING, StageConfig
from vlcot.degradation.kernels import (
    GAUSSIAN_KINDS,
    KERNEL_SIZES,
    SINC,
    BlurKernel,
    effective_sigma,
    gaussian_kernel,
    sample_blur_kernel,
    sample_final_sinc,
    sinc_kernel,
)

pytestmark = pytest.mark.unit


def _bessel_j1(x: float) -> float:
    """Bessel's integral, midpoint rule: (1/pi) * integral over [0, pi] of cos(t - x sin t)."""
    n = 400
    return sum(cos(t - x * sin(t)) for t in ((i + 0.5) * pi / n for i in range(n))) / n


def _expected_gaussian(kind: str, size: int, sx: float, sy: float, rotation: float, beta: float) -> np.ndarray:
    half = size // 2
    expected = np.empty((size, size))
    for row in range(size):
        for column in range(size):
            x, y = column - half, row - half
            # Coordinates along the rotated axes, from polar form.
            radius, angle = hypot(x, y), atan2(y, x) - rotation
            q = (radius * cos(angle) / sx) ** 2 + (radius * sin(angle) / sy) ** 2
            expected[row, column] = 1 / (1 + q**beta) if kind.startswith("plateau") else exp(-(q**beta) / 2)
    return expected / expected.sum()


def test_isotropic_gaussian_of_sigma_one_by_hand() -> None:
    e = exp(-0.5)
    row = np.array([e, 1.0, e])
    np.testing.assert_allclose(
        gaussian_kernel("iso", 3, 1.0, 1.0, 0.0, 1.0), np.outer(row, row) / row.sum() ** 2, rtol=1e-12
    )


def test_plateau_by_hand() -> None:
    # q = 0 at the centre, 1 on the sides, 2 in the corners; beta 2: 1, 1/2, 1/5.
    values = np.array([[0.2, 0.5, 0.2], [0.5, 1.0, 0.5], [0.2, 0.5, 0.2]])
    np.testing.assert_allclose(gaussian_kernel("plateau_iso", 3, 1, 1, 0, 2.0), values / 3.8, rtol=1e-12)


@pytest.mark.parametrize("kind", GAUSSIAN_KINDS)
@pytest.mark.parametrize("beta", [0.5, 1.0, 3.2])
def test_gaussian_families_equal_their_formulas(kind: str, beta: float) -> None:
    if kind in ("iso", "aniso"):
        beta = 1.0
    sy, rotation = (2.4, 0.7) if kind.endswith("aniso") else (0.8, 0.0)
    kernel = gaussian_kernel(kind, 9, 0.8, sy, rotation, beta)
    np.testing.assert_allclose(kernel, _expected_gaussian(kind, 9, 0.8, sy, rotation, beta), rtol=1e-9, atol=1e-15)


def test_rotation_turns_the_long_axis_from_x_towards_y() -> None:
    along_x = gaussian_kernel("aniso", 11, 3.0, 0.5, 0.0, 1.0)
    assert along_x[5, 9] > along_x[9, 5]
    np.testing.assert_allclose(gaussian_kernel("aniso", 11, 3.0, 0.5, pi / 2, 1.0), along_x.T, atol=1e-12)
    diagonal = gaussian_kernel("aniso", 11, 3.0, 0.5, pi / 4, 1.0)
    assert diagonal[8, 8] > 100 * diagonal[8, 2]


@pytest.mark.parametrize("omega", [pi / 5, pi / 3, pi])
def test_sinc_equals_its_formula(omega: float) -> None:
    expected = np.empty((7, 7))
    for row in range(7):
        for column in range(7):
            r = hypot(row - 3, column - 3)
            expected[row, column] = omega * _bessel_j1(omega * r) / (2 * pi * r) if r else omega**2 / (4 * pi)
    np.testing.assert_allclose(sinc_kernel(7, omega), expected / expected.sum(), rtol=1e-9, atol=1e-12)


def test_sinc_centre_is_the_limit_of_its_neighbourhood() -> None:
    omega, r = 1.3, 1e-4
    assert omega * _bessel_j1(omega * r) / (2 * pi * r) == pytest.approx(omega**2 / (4 * pi), rel=1e-6)


def test_sampled_kernels_are_21_wide_finite_and_sum_to_one() -> None:
    rng = np.random.default_rng(0)
    drawn = [sample_blur_kernel(SEESR_TRAINING.stage1, rng) for _ in range(500)]
    drawn += [sample_final_sinc(rng) for _ in range(100)]
    for kernel in drawn:
        pixels = kernel.render()
        assert pixels.shape == (21, 21)
        assert np.isfinite(pixels).all()
        assert pixels.sum() == pytest.approx(1.0, abs=1e-9)
        if kernel.kind != SINC:
            assert pixels.min() >= 0.0
        margin = (21 - kernel.size) // 2
        inside = pixels[margin : 21 - margin, margin : 21 - margin]
        assert np.abs(pixels).sum() == pytest.approx(np.abs(inside).sum())


def test_small_kernels_get_no_low_sinc_cutoff() -> None:
    rng = np.random.default_rng(1)
    drawn = [sample_blur_kernel(StageConfig(sinc_prob=1.0), rng) for _ in range(2000)]
    small = [k.omega for k in drawn if k.size < 13]
    large = [k.omega for k in drawn if k.size >= 13]
    assert {k.size for k in drawn} == set(KERNEL_SIZES)
    assert pi / 3 <= min(small) < pi / 3 + 0.02 and pi / 5 <= min(large) < pi / 5 + 0.02
    assert max(*small, *large) <= pi


def test_iso_kinds_have_one_sigma_and_no_rotation_and_only_shaped_kinds_a_beta() -> None:
    rng = np.random.default_rng(2)
    for _ in range(500):
        kernel = sample_blur_kernel(StageConfig(sinc_prob=0.0), rng)
        if kernel.kind.endswith("aniso"):
            assert kernel.sigma_x != kernel.sigma_y and kernel.rotation != 0.0
        else:
            assert (kernel.sigma_y, kernel.rotation) == (kernel.sigma_x, 0.0)
        if kernel.kind in ("iso", "aniso"):
            assert kernel.beta == 1.0


def test_effective_sigma_is_the_geometric_mean() -> None:
    assert effective_sigma(BlurKernel("aniso", 7, 0.5, 2.0)) == 1.0


@pytest.mark.parametrize("kind, size", [("box", 7), ("iso", 8), ("iso", 23)])
def test_impossible_kernels_are_refused(kind: str, size: int) -> None:
    with pytest.raises(ValueError, match="kernel"):
        BlurKernel(kind, size)
