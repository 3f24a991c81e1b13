"""Blur kernels: six Gaussian-like families and the 2-D sinc low-pass.

Families and draws follow Real-ESRGAN (arXiv 2107.10833, sections 3.1 and 3.4); the generalized and plateau
densities are those of Liu et al. (arXiv 2005.10437). Every kernel is padded to 21x21.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import cos, pi, sin, sqrt

import numpy as np
from scipy.special import j1

from vlcot.degradation.config import StageConfig

KERNEL_SIDE = 21
KERNEL_SIZES = tuple(range(7, KERNEL_SIDE + 1, 2))
GAUSSIAN_KINDS = (
    "iso",
    "aniso",
    "generalized_iso",
    "generalized_aniso",
    "plateau_iso",
    "plateau_aniso",
)
SINC = "sinc"


@dataclass(frozen=True)
class BlurKernel:
    """The parameters of one kernel.

    Attributes:
        kind: one of ``GAUSSIAN_KINDS`` or ``SINC``.
        size: side before padding, odd, at most 21 pixels.
        sigma_x, sigma_y: standard deviations along the rotated axes, pixels; equal for the iso kinds, 0 for sinc.
        rotation: of the first axis, radians; 0 for the iso kinds.
        beta: exponent of the generalized and plateau kinds; 1 for the others.
        omega: cutoff of sinc, radians per pixel; 0 for the others.
    """

    kind: str
    size: int
    sigma_x: float = 0.0
    sigma_y: float = 0.0
    rotation: float = 0.0
    beta: float = 1.0
    omega: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in (*GAUSSIAN_KINDS, SINC):
            raise ValueError(f"unknown kernel kind {self.kind!r}: allowed are {(*GAUSSIAN_KINDS, SINC)}")
        if self.size % 2 == 0 or not 1 <= self.size <= KERNEL_SIDE:
            raise ValueError(f"kernel size must be odd and in 1..{KERNEL_SIDE}, got {self.size}")

    def render(self) -> np.ndarray:
        """The kernel as float64 (21, 21), sum 1, zero outside ``size``."""
        if self.kind == SINC:
            kernel = sinc_kernel(self.size, self.omega)
        else:
            kernel = gaussian_kernel(self.kind, self.size, self.sigma_x, self.sigma_y, self.rotation, self.beta)
        return np.pad(kernel, (KERNEL_SIDE - self.size) // 2)


def gaussian_kernel(kind: str, size: int, sigma_x: float, sigma_y: float, rotation: float, beta: float) -> np.ndarray:
    """A Gaussian-like kernel of the covariance ``R diag(sigma_x^2, sigma_y^2) R^T``, float64 (size, size), sum 1.

    With q the squared Mahalanobis distance from the centre: exp(-q/2), generalized exp(-q^beta / 2),
    plateau 1 / (1 + q^beta). Rows are y, columns are x.
    """
    turn = np.array([[cos(rotation), -sin(rotation)], [sin(rotation), cos(rotation)]])
    precision = turn @ np.diag([sigma_x**-2, sigma_y**-2]) @ turn.T
    x, y = _offsets(size)
    q = precision[0, 0] * x**2 + 2 * precision[0, 1] * x * y + precision[1, 1] * y**2
    # Rounding may leave a tiny negative q on the long axis, and a fractional power of it is NaN.
    q = np.maximum(q, 0.0)
    density = 1.0 / (1.0 + q**beta) if kind.startswith("plateau") else np.exp(-0.5 * q**beta)
    return density / density.sum()


def sinc_kernel(size: int, omega: float) -> np.ndarray:
    """Circular low-pass of cutoff ``omega`` (radians per pixel), float64 (size, size), sum 1.

    ``omega * J1(omega * r) / (2 * pi * r)``, and its limit ``omega^2 / (4 * pi)`` at the centre.
    """
    x, y = _offsets(size)
    radius = np.hypot(x, y)
    centre = radius == 0
    radius[centre] = 1.0
    kernel = np.where(centre, omega**2 / (4 * pi), omega * j1(omega * radius) / (2 * pi * radius))
    return kernel / kernel.sum()


def sample_blur_kernel(stage: StageConfig, rng: np.random.Generator) -> BlurKernel:
    """Draw the blur of a stage: a sinc with ``sinc_prob``, else one of the six Gaussian kinds."""
    size = int(rng.choice(KERNEL_SIZES))
    if rng.random() < stage.sinc_prob:
        # Small kernels cannot hold the rings of a low cutoff.
        return BlurKernel(SINC, size, omega=rng.uniform(pi / 3 if size < 13 else pi / 5, pi))
    kind = str(rng.choice(GAUSSIAN_KINDS, p=stage.kernel_probs))
    sigma_x = rng.uniform(*stage.sigma_range)
    sigma_y, rotation = sigma_x, 0.0
    if kind.endswith("aniso"):
        sigma_y, rotation = rng.uniform(*stage.sigma_range), rng.uniform(-pi, pi)
    beta = 1.0
    if kind.startswith("generalized"):
        beta = _sample_beta(stage.generalized_beta_range, rng)
    elif kind.startswith("plateau"):
        beta = _sample_beta(stage.plateau_beta_range, rng)
    return BlurKernel(kind, size, sigma_x, sigma_y, rotation, beta)


def sample_final_sinc(rng: np.random.Generator) -> BlurKernel:
    """Draw the sinc filter that ends the degradation: any size, cutoff in [pi/3, pi]."""
    return BlurKernel(SINC, int(rng.choice(KERNEL_SIZES)), omega=rng.uniform(pi / 3, pi))


def effective_sigma(kernel: BlurKernel) -> float:
    """Geometric mean of the two sigmas, pixels: the radius of the circle with the ellipse's area."""
    return sqrt(kernel.sigma_x * kernel.sigma_y)


def _sample_beta(bounds: tuple[float, float], rng: np.random.Generator) -> float:
    """Below 1 half of the time, above 1 the other half."""
    low, high = bounds
    return rng.uniform(low, 1.0) if rng.random() < 0.5 else rng.uniform(1.0, high)


def _offsets(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Distance from the centre along x and y, each float64 (size, size)."""
    axis = np.arange(size) - size // 2.0
    x, y = np.meshgrid(axis, axis)
    return x, y
