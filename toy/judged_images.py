"""Groups of better and worse restorations of one crop, with scores that follow from how they were made.

These groups train and test the toy visual expert (`toy/train_qwen_vl.py`). Nobody judged the images: every score
is a comparison with the picture that an image was made from, its source (the group's ground truth, or another
crop for an inconsistent image):

* quality = 5 * SSIM(image, source) + 5 * (PSNR(image, source) - 12) / (40 - 12), each part clipped; SSIM of luma, 7x7
  windows: falls with blur, noise, blocks, JPEG, wrong colour. Where the severity is known it is the mean of that and
  10 * (1 - severity): distances alone rank a little noise below strong blur, and the severity says what is worse.
* realism = 10 * mean over 8x8 cells of min(t, s) / max(t, s), where t and s are the image's and the source's texture:
  standard deviation, within the cell, of luma minus its 3x3 mean, plus 1.5 grey levels. Smeared and noisy
  surfaces both score low, whatever the scene.
* consistency = 10 * (PSNR - 12) / (28 - 12), clipped to 0..10, where PSNR (dB, RGB) is to the group's ground truth.
* A picture without content (one colour, pure noise) has quality 0 and realism 0.

Severity is the parameter of the corruption, 0 (nothing done) to 1 (hardly recognisable), see `CORRUPTIONS`.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image
from scipy.ndimage import gaussian_filter, uniform_filter, zoom

from toy.photographs import Split, crop
from vlcot.degradation import DegradationConfig, degrade

SIZE = 64
SCORES = ("quality", "realism", "consistency")
_WEAKEST_DB, _STRONGEST_DB = 12.0, 28.0

Corruption = Callable[[np.ndarray, float, np.random.Generator], np.ndarray]
"""float32 [SIZE, SIZE, 3] in 0..255, severity in 0..1, generator -> the corrupted image, same shape."""


@dataclass(frozen=True)
class JudgedGroup:
    """Restorations of one crop.

    Attributes:
        lr: uint8 [SIZE / 4, SIZE / 4, 3].
        truth: uint8 [SIZE, SIZE, 3].
        images: uint8 [G, SIZE, SIZE, 3].
        kinds: how each image was made: a name of `CORRUPTIONS`, or truth, flat, static, other.
        severity: float64 [G] in 0..1; NaN where it is not known: `other` has none against this crop, and an image
            moved to a given PSNR has that of no corruption.
        psnr: float64 [G], dB to the truth, 60 at most.
        scores: float64 [G, 3] in 0..10, in the order of `SCORES`.
        cells: float64 [G, 16, 3], per 16x16 cell in reading order: SSIM to the source, texture match with it (0..1,
            means over the cells are what quality and realism are made of) and PSNR to the truth, 50 dB at most.
    """

    lr: np.ndarray
    truth: np.ndarray
    images: np.ndarray
    kinds: tuple[str, ...]
    severity: np.ndarray
    psnr: np.ndarray
    scores: np.ndarray
    cells: np.ndarray


def blur(image: np.ndarray, severity: float, rng: np.random.Generator) -> np.ndarray:
    """Gaussian blur, sigma up to 4 pixels."""
    sigma = 4 * severity**1.5
    return gaussian_filter(image, (sigma, sigma, 0))


def noise(image: np.ndarray, severity: float, rng: np.random.Generator) -> np.ndarray:
    """Gaussian noise, sigma up to 55 grey levels, grey or coloured, of grain 1 or 2 pixels."""
    channels = int(rng.choice([1, 3]))
    if rng.random() < 0.3:
        grain = rng.normal(size=(SIZE // 2, SIZE // 2, channels)).repeat(2, axis=0).repeat(2, axis=1)
    else:
        grain = rng.normal(size=(SIZE, SIZE, channels))
    return image + 55 * severity * grain


def jpeg(image: np.ndarray, severity: float, rng: np.random.Generator) -> np.ndarray:
    """JPEG of quality 70 down to 1."""
    buffer = io.BytesIO()
    Image.fromarray(_to_uint8(image)).save(buffer, "JPEG", quality=max(1, round(70 * (1 - severity) ** 2)))
    return np.asarray(Image.open(buffer), dtype=np.float32)


def blocks(image: np.ndarray, severity: float, rng: np.random.Generator) -> np.ndarray:
    """Cells of 4, 8 or 16 pixels drawn towards their mean colour, which is itself off by up to 30 grey levels."""
    side = int(rng.choice([4, 8, 16]))
    cells = image.reshape(SIZE // side, side, SIZE // side, side, 3).mean(axis=(1, 3))
    cells = cells + 30 * severity * rng.normal(size=cells.shape)
    return (1 - severity) * image + severity * cells.repeat(side, axis=0).repeat(side, axis=1)


def codes(image: np.ndarray, severity: float, rng: np.random.Generator) -> np.ndarray:
    """A share of 0 to 0.7 of the 8x8 cells shows another cell, with soft seams: wrong codes of a VQ image."""
    cells = image.reshape(8, 8, 8, 8, 3).swapaxes(1, 2).reshape(64, 8, 8, 3)
    wrong = rng.random(64) < 0.7 * severity
    shown = np.where(wrong, rng.permutation(64), np.arange(64))
    swapped = cells[shown].reshape(8, 8, 8, 8, 3).swapaxes(1, 2).reshape(SIZE, SIZE, 3)
    mask = gaussian_filter(wrong.reshape(8, 8).repeat(8, axis=0).repeat(8, axis=1).astype(np.float32), 1.0)
    return image + mask[..., None] * (swapped - image)


def palette(image: np.ndarray, severity: float, rng: np.random.Generator) -> np.ndarray:
    """Fewer levels per channel: 32 down to 2."""
    levels = round(2 ** (5 - 4 * severity))
    step = 255 / (levels - 1)
    quantised = np.round(image / step) * step
    return image + min(1.0, 4 * severity) * (quantised - image)


def tint(image: np.ndarray, severity: float, rng: np.random.Generator) -> np.ndarray:
    """Smooth shift of colour over the picture, up to 60 grey levels rms."""
    field = zoom(rng.normal(size=(3, 3, 3)), (SIZE / 3, SIZE / 3, 1), order=1)
    return image + 60 * severity * field / np.sqrt(np.mean(field**2))


def enlarged(image: np.ndarray, severity: float, rng: np.random.Generator) -> np.ndarray:
    """Mixed with its own Real-ESRGAN degradation (`vlcot.degradation`), enlarged again by bicubic."""
    lr, _ = degrade(_to_uint8(image), DegradationConfig(), int(rng.integers(2**31)))
    return image + severity * (enlarge(lr).astype(np.float32) - image)


CORRUPTIONS: dict[str, Corruption] = {
    "blur": blur,
    "noise": noise,
    "jpeg": jpeg,
    "blocks": blocks,
    "codes": codes,
    "palette": palette,
    "tint": tint,
    "enlarged": enlarged,
}


def judged_group(index: int, split: Split, size: int, seed: int = 0) -> JudgedGroup:
    """Group number `index` of a split: the same arguments always give the same group.

    Four groups of ten hold images at PSNRs drawn from a window of 14 to 24 dB (corruptions mixed with the truth so
    that the PSNR is met), the range of a weak policy; the others hold corruptions of any severity. In every group
    some images are the truth, one colour, noise, or of another crop.
    """
    rng = np.random.default_rng([seed, index, 1 if split == "heldout" else 0, 77])
    truth = crop(index, split, seed, SIZE).image
    lr, _ = degrade(truth, DegradationConfig(), int(rng.integers(2**31)))
    low = rng.uniform(13, 22)
    window = (low, low + rng.uniform(2, 9)) if rng.random() < 0.4 else None
    made = [_restoration(truth, index, split, seed, window, rng) for _ in range(size)]
    kinds, severity = tuple(kind for *_, kind, _ in made), np.array([severity for *_, severity in made])
    images, sources = (np.stack([entry[i] for entry in made]) for i in (0, 1))
    return _judge(lr, truth, images, sources, kinds, severity)


def graded_group(
    index: int, split: Split, kinds: tuple[str, ...], severities: np.ndarray, seed: int = 0
) -> JudgedGroup:
    """Group in which image i is `kinds[i]` at `severities[i]` (float [G]) and nothing else was done to it."""
    rng = np.random.default_rng([seed, index, 78])
    truth = crop(index, split, seed, SIZE).image
    lr, _ = degrade(truth, DegradationConfig(), int(rng.integers(2**31)))
    images = np.stack([corrupt(truth, k, float(s), rng) for k, s in zip(kinds, severities, strict=True)])
    return _judge(lr, truth, images, np.broadcast_to(truth, images.shape), kinds, np.asarray(severities, np.float64))


def corrupt(image: np.ndarray, kind: str, severity: float, rng: np.random.Generator) -> np.ndarray:
    """uint8 image corrupted by `CORRUPTIONS[kind]`; severity 0 gives it back unchanged."""
    return _to_uint8(CORRUPTIONS[kind](image.astype(np.float32), severity, rng)) if severity > 0 else image.copy()


def enlarge(lr: np.ndarray, size: int = SIZE) -> np.ndarray:
    """uint8 [h, w, 3] -> uint8 [size, size, 3], bicubic."""
    return np.asarray(Image.fromarray(lr).resize((size, size), Image.Resampling.BICUBIC))


def psnr_db(image: np.ndarray, truth: np.ndarray) -> float:
    """PSNR over RGB in dB, 60 at most (equal images)."""
    mse = float(np.mean((image.astype(np.float64) - truth) ** 2))
    return min(60.0, 10 * np.log10(255**2 / max(mse, 1e-9)))


def _restoration(
    truth: np.ndarray, index: int, split: Split, seed: int, window: tuple[float, float] | None, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, str, float]:
    """Image, its source, kind and severity."""
    draw = rng.random()
    if draw < 0.05:
        return truth, truth, "truth", 0.0
    if draw < 0.10:
        colour = truth.mean(axis=(0, 1)) if rng.random() < 0.6 else rng.uniform(0, 255, 3)
        return _to_uint8(np.broadcast_to(colour, truth.shape)), truth, "flat", 1.0
    if draw < 0.15:
        grain = int(rng.choice([1, 2, 4, 8]))
        field = rng.normal(size=(SIZE // grain, SIZE // grain, 3)).repeat(grain, axis=0).repeat(grain, axis=1)
        centre = truth.mean(axis=(0, 1)) if rng.random() < 0.6 else 128
        return _to_uint8(centre + rng.uniform(15, 80) * field), truth, "static", 1.0
    source = truth
    if draw < 0.23:
        # Consecutive crops show different photographs, so the step must not be a multiple of their number only.
        source = crop(index + int(rng.integers(1, 200)), split, seed, SIZE).image
        window = None
    kind = str(rng.choice(list(CORRUPTIONS)))
    severity = float(rng.uniform(0.02, 1))
    image = corrupt(source, kind, severity, rng)
    if rng.random() < 0.25:
        second = severity * rng.uniform(0.2, 0.8)
        image = corrupt(image, str(rng.choice(list(CORRUPTIONS))), second, rng)
        severity = 1 - (1 - severity) * (1 - second)
    if window is not None:
        image, severity = _at_psnr(corrupt(image, kind, 0.5, rng), truth, rng.uniform(*window)), float("nan")
    return image, source, kind if source is truth else "other", severity if source is truth else float("nan")


def _at_psnr(image: np.ndarray, truth: np.ndarray, goal_db: float) -> np.ndarray:
    """`image` moved on the line through `truth` until its PSNR is the goal (1.5 times as far at most)."""
    factor = min(1.5, 10 ** ((psnr_db(image, truth) - goal_db) / 20))
    return _to_uint8(truth + factor * (image.astype(np.float32) - truth))


def _judge(
    lr: np.ndarray,
    truth: np.ndarray,
    images: np.ndarray,
    sources: np.ndarray,
    kinds: tuple[str, ...],
    severity: np.ndarray,
) -> JudgedGroup:
    psnr = np.array([psnr_db(image, truth) for image in images])
    to_source = np.array([psnr_db(image, source) for image, source in zip(images, sources, strict=True)])
    cells = np.array([_cells(image, source, truth) for image, source in zip(images, sources, strict=True)])
    empty = np.isin(kinds, ("flat", "static"))
    cells[empty, :, :2] = 0
    likeness, texture = cells[..., 0].mean(axis=1), cells[..., 1].mean(axis=1)
    quality = 5 * likeness.clip(0) + 5 * ((to_source - 12) / (40 - 12)).clip(0, 1)
    quality = np.where(np.isnan(severity), quality, (quality + 10 * (1 - severity)) / 2)
    consistency = 10 * (psnr - _WEAKEST_DB) / (_STRONGEST_DB - _WEAKEST_DB)
    scores = np.stack([np.where(empty, 0, quality), 10 * texture, consistency.clip(0, 10)], axis=-1)
    return JudgedGroup(lr, truth, images, kinds, severity, psnr, scores, cells)


def _cells(image: np.ndarray, source: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """float64 [16, 3]: SSIM and texture match with the source, PSNR (dB) to the truth of each 16x16 cell."""
    a, b = _texture(image), _texture(source)
    error = ((image.astype(np.float64) - truth) ** 2).mean(axis=-1)
    psnr = np.minimum(50, 10 * np.log10(255**2 / np.maximum(_by_cell(error, 4), 1e-9)))
    match = _by_cell(np.minimum(a, b) / np.maximum(a, b), 4)
    return np.stack([_by_cell(_ssim(_luma(image), _luma(source)), 4), match, psnr], axis=-1).reshape(16, 3)


def _by_cell(values: np.ndarray, count: int) -> np.ndarray:
    """Means of [H, W] over `count` x `count` equal cells."""
    side = len(values) // count
    return values.reshape(count, side, count, side).mean(axis=(1, 3))


def _ssim(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """SSIM (Wang et al. 2004) at every pixel of two luma images in 0..255, uniform 7x7 windows."""
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    mean_a, mean_b = uniform_filter(a, 7), uniform_filter(b, 7)
    var_a = uniform_filter(a * a, 7) - mean_a**2
    var_b = uniform_filter(b * b, 7) - mean_b**2
    cov = uniform_filter(a * b, 7) - mean_a * mean_b
    return (2 * mean_a * mean_b + c1) * (2 * cov + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))


def _texture(image: np.ndarray) -> np.ndarray:
    """[8, 8]: standard deviation, in each 8x8 cell, of luma minus its 3x3 mean, plus 1.5 grey levels."""
    luma = _luma(image)
    fine = (luma - uniform_filter(luma, 3)).reshape(8, 8, 8, 8)
    return fine.std(axis=(1, 3)) + 1.5


def _luma(image: np.ndarray) -> np.ndarray:
    return image.astype(np.float64) @ np.array([0.299, 0.587, 0.114])


def _to_uint8(image: np.ndarray) -> np.ndarray:
    return np.clip(np.round(image), 0, 255).astype(np.uint8)
