"""Labelled images for the toy detector and segmenter: composed scenes and real crops, clean and degraded."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
from PIL import Image

from toy.photographs import Box, Split, crop
from toy.scenes import scene
from vlcot.degradation import SEESR_TRAINING, degrade, make_target

SIZE = 64


@dataclass(frozen=True, eq=False)
class Example:
    """image uint8 [H, W, 3] and its objects; boxes x0, y0, x1, y1 in pixels of the image."""

    image: np.ndarray
    names: tuple[str, ...]
    boxes: tuple[Box, ...]


def scene_examples(count: int, split: Split, seed: int = 0) -> list[Example]:
    """Composed scenes (`toy.scenes`)."""
    drawn = (scene(i, split, seed, SIZE) for i in range(count))
    return [Example(s.image, tuple(o.name for o in s.objects), tuple(o.box for o in s.objects)) for s in drawn]


def crop_examples(count: int, split: Split, seed: int = 0) -> list[Example]:
    """Real crops (`toy.photographs`), those without any object included."""
    drawn = (crop(i, split, seed, SIZE) for i in range(count))
    return [Example(c.image, tuple(o.name for o in c.objects), tuple(o.box for o in c.objects)) for c in drawn]


def low_resolution(image: np.ndarray, seed: int) -> np.ndarray:
    """The image at a quarter of its size, degraded: what the toy task starts from."""
    return degrade(make_target(image, SEESR_TRAINING), SEESR_TRAINING, seed)[0]


def enlarged(image: np.ndarray) -> np.ndarray:
    """Back to 64x64, as the image processors of the toy models do it."""
    return np.asarray(Image.fromarray(image).resize((SIZE, SIZE), Image.Resampling.BICUBIC))


def degraded(examples: list[Example], seed: int) -> list[Example]:
    """The same examples as low-resolution images, example ``i`` with seed ``seed + i``; boxes in their pixels."""
    changed = []
    for i, example in enumerate(examples):
        image = low_resolution(example.image, seed + i)
        share = image.shape[0] / example.image.shape[0]
        boxes = tuple((x0 * share, y0 * share, x1 * share, y1 * share) for x0, y0, x1, y1 in example.boxes)
        changed.append(Example(image, example.names, boxes))
    return changed


class Batches:
    """Training batches of 64x64 images: scenes and crops, mirrored at random, half of them degraded and enlarged.

    A quarter of the crops shows no object; the others are drawn so that rare objects are seen about as often as common
    ones.
    """

    def __init__(self, scenes: list[Example], crops: list[Example], seed: int) -> None:
        self._rng = np.random.default_rng(seed)
        self._scenes, self._crops = scenes, crops
        frequency = Counter(name for example in crops for name in set(example.names))
        weights = np.array([max((frequency[n] ** -0.5 for n in e.names), default=0.0) for e in crops])
        self._p = 0.75 * weights / weights.sum()
        self._p[weights == 0] = 0.25 / (weights == 0).sum()

    def draw(self, size: int, scene_share: float = 0.5, degraded_share: float = 0.5) -> list[Example]:
        """The next batch."""
        return [self._draw_one(scene_share, degraded_share) for _ in range(size)]

    def prompt(self, names: list[str]) -> list[str]:
        """Names in random order: all of them, or a random part in three of ten batches."""
        order = [names[i] for i in self._rng.permutation(len(names))]
        return order if self._rng.random() < 0.7 else order[: int(self._rng.integers(4, len(names)))]

    def _draw_one(self, scene_share: float, degraded_share: float) -> Example:
        rng = self._rng
        if rng.random() < scene_share:
            example = self._scenes[int(rng.integers(len(self._scenes)))]
        else:
            example = self._crops[int(rng.choice(len(self._crops), p=self._p))]
        image, boxes = example.image, example.boxes
        if rng.random() < 0.5:
            image = np.ascontiguousarray(image[:, ::-1])
            boxes = tuple((SIZE - x1, y0, SIZE - x0, y1) for x0, y0, x1, y1 in boxes)
        if rng.random() < degraded_share:
            image = enlarged(low_resolution(image, int(rng.integers(2**31))))
        return Example(image, example.names, boxes)
