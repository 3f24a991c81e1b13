"""What a degradation is drawn from: the values of Real-ESRGAN as SeeSR uses them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace


def _check_probability(name: str, value: float) -> None:
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name} must be a probability in [0, 1], got {value}")


def _check_distribution(name: str, values: Sequence[float], count: int) -> None:
    if len(values) != count or min(values) < 0.0 or abs(sum(values) - 1.0) > 1e-9:
        raise ValueError(f"{name} must be {count} probabilities that sum to 1, got {tuple(values)}")


def _check_range(name: str, values: Sequence[float], above: float, around_one: bool = False) -> None:
    low, high = values
    if not above < low <= high:
        raise ValueError(f"{name} must be (low, high) with {above:g} < low <= high, got {tuple(values)}")
    if around_one and not low <= 1.0 <= high:
        raise ValueError(f"{name} must contain 1, got {tuple(values)}")


@dataclass(frozen=True)
class StageConfig:
    """One of the two stages: blur, resize, noise, JPEG. Ranges are (low, high), drawn uniformly.

    The defaults are stage 1 of SeeSR's training pairs (``SeeSR/utils_data/make_paired_data.py``).

    Raises:
        ValueError: a probability outside [0, 1], a distribution that does not sum to 1, or an impossible range.
    """

    blur_prob: float = 1.0
    kernel_probs: tuple[float, ...] = (0.45, 0.25, 0.12, 0.03, 0.12, 0.03)
    """One per :data:`vlcot.degradation.kernels.GAUSSIAN_KINDS`, in its order."""
    sinc_prob: float = 0.1
    sigma_range: tuple[float, float] = (0.2, 3.0)
    """Standard deviation of the blur, pixels."""
    generalized_beta_range: tuple[float, float] = (0.5, 4.0)
    plateau_beta_range: tuple[float, float] = (1.0, 2.0)
    resize_probs: tuple[float, ...] = (0.2, 0.7, 0.1)
    """Up, down, keep."""
    resize_range: tuple[float, float] = (0.15, 1.5)
    """Smallest factor of a downscale, largest of an upscale; both start at 1."""
    gaussian_noise_prob: float = 0.5
    """Else Poisson."""
    gaussian_sigma_range: tuple[float, float] = (1.0, 30.0)
    """Of 255."""
    poisson_scale_range: tuple[float, float] = (0.05, 3.0)
    gray_noise_prob: float = 0.4
    jpeg_quality_range: tuple[int, int] = (30, 95)

    def __post_init__(self) -> None:
        for name in ("blur_prob", "sinc_prob", "gaussian_noise_prob", "gray_noise_prob"):
            _check_probability(name, getattr(self, name))
        _check_distribution("kernel_probs", self.kernel_probs, 6)
        _check_distribution("resize_probs", self.resize_probs, 3)
        _check_range("sigma_range", self.sigma_range, above=0.0)
        _check_range("gaussian_sigma_range", self.gaussian_sigma_range, above=0.0)
        _check_range("poisson_scale_range", self.poisson_scale_range, above=0.0)
        for name in ("generalized_beta_range", "plateau_beta_range", "resize_range"):
            _check_range(name, getattr(self, name), above=0.0, around_one=True)
        _check_range("jpeg_quality_range", self.jpeg_quality_range, above=0.0)
        if self.jpeg_quality_range[1] > 100 or any(int(q) != q for q in self.jpeg_quality_range):
            raise ValueError(f"jpeg_quality_range must hold integers in 1..100, got {self.jpeg_quality_range}")


@dataclass(frozen=True)
class DegradationConfig:
    """A two-stage degradation that ends at 1/4 of the target's size.

    The defaults are SeeSR's training values (``SeeSR/utils_data/make_paired_data.py``, equal to Real-ESRGAN's
    ``train_realesrgan_x4plus.yml``).

    Raises:
        ValueError: as :class:`StageConfig`.
    """

    stage1: StageConfig = field(default_factory=StageConfig)
    stage2: StageConfig = field(
        default_factory=lambda: StageConfig(
            blur_prob=0.8,
            sigma_range=(0.2, 1.5),
            resize_probs=(0.3, 0.4, 0.3),
            resize_range=(0.3, 1.2),
            gaussian_sigma_range=(1.0, 25.0),
            poisson_scale_range=(0.05, 2.5),
        )
    )
    final_sinc_prob: float = 0.8
    jpeg_last_prob: float = 0.5
    """The last JPEG comes after the last resize (order A), else before it (order B)."""
    sharpen_target: bool = True
    """SeeSR sharpens the target (USM) before it is degraded and saved; OSEDiff does not. Read by ``make_target``."""

    def __post_init__(self) -> None:
        _check_probability("final_sinc_prob", self.final_sinc_prob)
        _check_probability("jpeg_last_prob", self.jpeg_last_prob)


SEESR_TRAINING = DegradationConfig()
"""What "the same degradation settings as SeeSR" means in the paper."""

SEESR_LIGHT = replace(
    SEESR_TRAINING,
    stage1=replace(
        SEESR_TRAINING.stage1,
        resize_range=(0.3, 1.5),
        gaussian_sigma_range=(1.0, 15.0),
        poisson_scale_range=(0.05, 2.0),
        jpeg_quality_range=(60, 95),
    ),
    stage2=replace(
        SEESR_TRAINING.stage2,
        blur_prob=0.5,
        resize_range=(0.6, 1.2),
        gaussian_sigma_range=(1.0, 12.0),
        poisson_scale_range=(0.05, 1.0),
        jpeg_quality_range=(60, 100),
    ),
)
"""``SeeSR/dataloaders/params_realesrgan.yml``: well known, but not what SeeSR's training pairs were made with."""
