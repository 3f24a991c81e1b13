"""Composed scenes: photographed objects pasted on photographed backgrounds, with exact boxes and masks.

Split. Backgrounds come from the same split's windows (see `toy.photographs`), and the longest side of a pasted
object is an even number of pixels in training scenes and odd in held-out ones, so no object appears in both
splits at the same scale.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from toy.photographs import (
    SPLIT_KEYS,
    PhotographedObject,
    Split,
    load_photographs,
    sample_crop,
    split_of,
)

BACKGROUNDS = ("brick", "grass", "gravel", "ihc")
_PLACEMENT_TRIES = 20


@dataclass(frozen=True)
class SceneObject:
    """name, box x0, y0, x1, y1 (int pixels, exclusive end) and mask bool [size, size] of its pixels."""

    name: str
    box: tuple[int, int, int, int]
    mask: np.ndarray


@dataclass(frozen=True)
class Scene:
    """image uint8 [size, size, 3] and its objects, none of which overlap."""

    image: np.ndarray
    objects: tuple[SceneObject, ...]


def scene_names() -> list[str]:
    """Sorted names of the objects that scenes may hold."""
    return sorted(_cutouts())


def scene(index: int, split: Split, seed: int = 0, size: int = 64, max_objects: int = 2) -> Scene:
    """Scene number `index` of a split with 1 to max_objects objects: the same arguments give the same scene.

    Objects keep their aspect; the longest side is 0.4 to 0.7 of the scene. An object that finds no free place is
    left out, the first one never. Raises ValueError for an unknown split or a negative index.
    """
    if split not in SPLIT_KEYS:
        raise ValueError(f"split is {split!r}; it must be 'train' or 'heldout'")
    if index < 0:
        raise ValueError(f"index is {index}; it must not be negative")
    rng = np.random.default_rng([seed, SPLIT_KEYS[split], index])
    image = _background(rng, split, size)
    names = rng.choice(scene_names(), size=int(rng.integers(1, max_objects + 1)), replace=False)
    objects: list[SceneObject] = []
    for name in names:
        candidates = _cutouts()[name]
        source, item = candidates[int(rng.integers(len(candidates)))]
        pixels, mask = _cut_out(source, item, _side(rng, split, size), flip=bool(rng.random() < 0.5))
        corner = _free_corner(rng, mask.shape, objects, size)
        if corner is not None:
            objects.append(_paste(image, pixels, mask, corner, str(name)))
    return Scene(image, tuple(objects))


def _cutouts() -> dict[str, list[tuple[np.ndarray, PhotographedObject]]]:
    found: dict[str, list[tuple[np.ndarray, PhotographedObject]]] = {}
    for photograph in load_photographs().values():
        for item in photograph.objects:
            if item.cutout is not None:
                found.setdefault(item.name, []).append((photograph.pixels, item))
    return found


def _background(rng: np.random.Generator, split: Split, size: int) -> np.ndarray:
    photograph = load_photographs()[BACKGROUNDS[int(rng.integers(len(BACKGROUNDS)))]]
    return sample_crop(photograph, rng, size, accept=lambda w: split_of(photograph, w) == split).image.copy()


def _side(rng: np.random.Generator, split: Split, size: int) -> int:
    even = 2 * int(rng.integers(round(0.2 * size), round(0.35 * size)))
    return even if split == "train" else even + 1


def _cut_out(source: np.ndarray, item: PhotographedObject, longest: int, flip: bool) -> tuple[np.ndarray, np.ndarray]:
    """Pixels uint8 [h, w, 3] and mask bool [h, w] of an object with max(h, w) == longest."""
    x0, y0, x1, y1 = (round(v) for v in item.box)
    scale = longest / max(x1 - x0, y1 - y0)
    w, h = max(round((x1 - x0) * scale), 1), max(round((y1 - y0) * scale), 1)
    image = Image.fromarray(source[y0:y1, x0:x1]).resize((w, h), Image.Resampling.BICUBIC)
    pixels = np.asarray(image)[:, ::-1] if flip else np.asarray(image)
    mask = np.ones((h, w), dtype=bool)
    if item.cutout == "ellipse":
        row, col = np.mgrid[0:h, 0:w] + 0.5
        mask = ((col / w - 0.5) ** 2 + (row / h - 0.5) ** 2) <= 0.25
    return pixels, mask


def _free_corner(
    rng: np.random.Generator, shape: tuple[int, ...], objects: list[SceneObject], size: int
) -> tuple[int, int] | None:
    """Top-left x, y where an h x w box meets no object, or None when no draw finds one."""
    h, w = shape
    for _ in range(_PLACEMENT_TRIES):
        x, y = int(rng.integers(0, size - w + 1)), int(rng.integers(0, size - h + 1))
        if all(x >= o.box[2] or x + w <= o.box[0] or y >= o.box[3] or y + h <= o.box[1] for o in objects):
            return x, y
    return None


def _paste(image: np.ndarray, pixels: np.ndarray, mask: np.ndarray, corner: tuple[int, int], name: str) -> SceneObject:
    x, y = corner
    h, w = mask.shape
    target = image[y : y + h, x : x + w]
    target[mask] = pixels[mask]
    full = np.zeros(image.shape[:2], dtype=bool)
    full[y : y + h, x : x + w] = mask
    rows, cols = np.nonzero(full)
    box = (int(cols.min()), int(rows.min()), int(cols.max()) + 1, int(rows.max()) + 1)
    return SceneObject(name, box, full)
