"""The two-stage degradation of Real-ESRGAN (arXiv 2107.10833, figure 2) with SeeSR's values.

All parameters are drawn per image. SeeSR draws some of them once per batch of 10; see docs/degradation.md.
"""

from __future__ import annotations

import numpy as np

from vlcot.degradation.config import DegradationConfig, StageConfig
from vlcot.degradation.kernels import BlurKernel, sample_blur_kernel, sample_final_sinc
from vlcot.degradation.record import (
    DOWN,
    GAUSSIAN,
    POISSON,
    RESIZE_DIRECTIONS,
    UP,
    DegradationRecord,
    Noise,
    Resize,
    Stage,
)
from vlcot.degradation.steps import (
    RESIZE_MODES,
    add_gaussian_noise,
    add_poisson_noise,
    filter2d,
    jpeg,
    rescale,
    resize,
    to_float,
    to_uint8,
    usm_sharpen,
)

SCALE = 4
"""Target side / LR side. The paper and its chain (1/4, 1/2, 1) know no other."""

_SEED_BOUND = 2**53
"""Seeds stay exact in JSON readers that hold numbers as doubles."""


def make_target(image: np.ndarray, config: DegradationConfig) -> np.ndarray:
    """The target of a pair, uint8 (H, W, 3): ``image``, sharpened if the config says so.

    Sharpening rounds to 8 bit before the degradation, so that the saved target gives the LR image again.

    Raises:
        ValueError: ``image`` is not uint8 RGB.
    """
    _check_image(image, np.uint8)
    return to_uint8(usm_sharpen(to_float(image))) if config.sharpen_target else image


def degrade(hq: np.ndarray, config: DegradationConfig, seed: int) -> tuple[np.ndarray, DegradationRecord]:
    """Degrade a target. Equal arguments give equal results.

    Args:
        hq: uint8 (H, W, 3) RGB, from :func:`make_target`.
        config: what to draw from.
        seed: of all draws.

    Returns:
        LR image, uint8 (H // 4, W // 4, 3), and the record that makes it again.

    Raises:
        ValueError: ``hq`` is not uint8 RGB or a side is below 4 pixels.
    """
    _check_image(hq, np.uint8)
    record = sample_record(config, np.random.default_rng(seed), *hq.shape[:2])
    return apply_record(to_float(hq), record), record


def sample_record(config: DegradationConfig, rng: np.random.Generator, height: int, width: int) -> DegradationRecord:
    """Draw the degradation of a target of ``height`` x ``width`` pixels.

    Raises:
        ValueError: a side is below 4 pixels.
    """
    if min(height, width) < SCALE:
        raise ValueError(f"a target needs at least {SCALE}x{SCALE} pixels, got {height}x{width}")
    return DegradationRecord(
        height=height,
        width=width,
        stage1=_sample_stage(config.stage1, rng),
        stage2=_sample_stage(config.stage2, rng),
        final_sinc=sample_final_sinc(rng) if rng.random() < config.final_sinc_prob else None,
        final_mode=str(rng.choice(RESIZE_MODES)),
        jpeg_last=bool(rng.random() < config.jpeg_last_prob),
    )


def apply_record(hq: np.ndarray, record: DegradationRecord) -> np.ndarray:
    """Degrade a target by a record.

    Args:
        hq: float32 (H, W, 3) RGB in [0, 1].
        record: from :func:`sample_record` for this size.

    Returns:
        uint8 (H // 4, W // 4, 3) RGB.

    Raises:
        ValueError: ``hq`` is not float32 RGB or has another size than the record.
    """
    _check_image(hq, np.float32)
    if hq.shape[:2] != (record.height, record.width):
        raise ValueError(f"the record is for {record.height}x{record.width} pixels, got {hq.shape[:2]}")
    height, width = record.height // SCALE, record.width // SCALE
    first, second = record.stage1, record.stage2

    image = _blur(hq, first.blur)
    image = rescale(image, first.resize.factor, first.resize.mode)
    image = _add_noise(image, first.noise)
    image = jpeg(image, first.jpeg_quality)

    image = _blur(image, second.blur)
    between = [max(1, int(side / SCALE * second.resize.factor)) for side in (record.height, record.width)]
    image = resize(image, between[0], between[1], second.resize.mode)
    image = _add_noise(image, second.noise)
    if not record.jpeg_last:
        image = jpeg(image, second.jpeg_quality)
    image = resize(image, height, width, record.final_mode)
    image = _blur(image, record.final_sinc)
    if record.jpeg_last:
        image = jpeg(image, second.jpeg_quality)
    return to_uint8(image)


def _sample_stage(stage: StageConfig, rng: np.random.Generator) -> Stage:
    return Stage(
        blur=sample_blur_kernel(stage, rng) if rng.random() < stage.blur_prob else None,
        resize=_sample_resize(stage, rng),
        noise=_sample_noise(stage, rng),
        jpeg_quality=int(rng.integers(*stage.jpeg_quality_range, endpoint=True)),
    )


def _sample_resize(stage: StageConfig, rng: np.random.Generator) -> Resize:
    direction = str(rng.choice(RESIZE_DIRECTIONS, p=stage.resize_probs))
    low, high = stage.resize_range
    factor = 1.0
    if direction == UP:
        factor = rng.uniform(1.0, high)
    elif direction == DOWN:
        factor = rng.uniform(low, 1.0)
    return Resize(direction, factor, str(rng.choice(RESIZE_MODES)))


def _sample_noise(stage: StageConfig, rng: np.random.Generator) -> Noise:
    gaussian = rng.random() < stage.gaussian_noise_prob
    return Noise(
        kind=GAUSSIAN if gaussian else POISSON,
        level=rng.uniform(*(stage.gaussian_sigma_range if gaussian else stage.poisson_scale_range)),
        gray=bool(rng.random() < stage.gray_noise_prob),
        seed=int(rng.integers(_SEED_BOUND)),
    )


def _blur(image: np.ndarray, kernel: BlurKernel | None) -> np.ndarray:
    return image if kernel is None else filter2d(image, kernel.render())


def _add_noise(image: np.ndarray, noise: Noise) -> np.ndarray:
    add = {GAUSSIAN: add_gaussian_noise, POISSON: add_poisson_noise}[noise.kind]
    return add(image, noise.level, noise.gray, np.random.default_rng(noise.seed))


def _check_image(image: np.ndarray, dtype: type) -> None:
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != dtype:
        raise ValueError(f"expected RGB (height, width, 3) {np.dtype(dtype)}, got {image.dtype} of shape {image.shape}")
