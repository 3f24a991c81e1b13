"""Real photographs with named objects, and square crops of them with truthful short captions.

The photographs ship inside scikit-image and scikit-learn; `photographs.yaml` says where and what they show.

Held-out rule. Every photograph is divided into a 5x5 grid of cells; cell (row, col) is held out when
(row + 2 * col) % 5 == 0, five cells of 25, one per row and per column. A crop belongs to the split of the cell
that holds the centre of its window. So no window is in both splits, and no held-out window has its centre in a
cell where a training window has its own. Held-out centres are also kept to the inner half of their cell, so a
held-out window is never within a quarter of a cell of a training window. Windows do overlap across the splits:
sixteen photographs cannot show whole objects otherwise. Held-out figures therefore measure new framings of
known photographs, not new photographs.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
import yaml
from PIL import Image

Split = Literal["train", "heldout"]
Box = tuple[float, float, float, float]
"""x0, y0, x1, y1 in pixels; x1 and y1 are exclusive."""

GRID = 5
MANIFEST = Path(__file__).with_name("photographs.yaml")
_FOLDERS = {"skimage": "data", "sklearn": "datasets/images"}
SPLIT_KEYS = {"train": 0, "heldout": 1}
_MAX_DRAWS = 10_000


@dataclass(frozen=True)
class PhotographedObject:
    """One instance of a named object. `cutout` is the mask shape for pasting, or None when it is not pasted."""

    name: str
    box: Box
    look: str
    detail: str
    cutout: Literal["ellipse", "rectangle"] | None


@dataclass(frozen=True)
class Region:
    """Captions of a part of a photograph where no object is visible; box None means everywhere."""

    box: Box | None
    coarse: str
    middle: str
    detail: str


@dataclass(frozen=True)
class Photograph:
    """name, pixels uint8 [H, W, 3] (read-only), objects and region captions."""

    name: str
    pixels: np.ndarray
    objects: tuple[PhotographedObject, ...]
    regions: tuple[Region, ...]


@dataclass(frozen=True)
class Window:
    """Square window of a photograph, in its pixels; `flip` mirrors the crop left to right."""

    x: int
    y: int
    side: int
    flip: bool

    @property
    def centre(self) -> tuple[float, float]:
        return self.x + self.side / 2, self.y + self.side / 2


@dataclass(frozen=True)
class VisibleObject:
    """A named object in a crop; box in crop pixels, clipped to the crop."""

    name: str
    box: Box


@dataclass(frozen=True)
class Captions:
    """coarse <= 5 words, middle <= 8 words, fine <= 10 words, lower case."""

    coarse: str
    middle: str
    fine: str


@dataclass(frozen=True)
class Crop:
    """image uint8 [size, size, 3], visible objects (largest first), captions, and where the crop comes from."""

    image: np.ndarray
    objects: tuple[VisibleObject, ...]
    captions: Captions
    photograph: str
    window: Window


@lru_cache(maxsize=1)
def load_photographs() -> dict[str, Photograph]:
    """All photographs of the manifest by name, in manifest order. Raises FileNotFoundError for a missing file."""
    manifest = yaml.safe_load(MANIFEST.read_text(encoding="utf-8"))
    return {name: _load(name, entry) for name, entry in manifest.items()}


def object_names() -> list[str]:
    """Sorted names of every photographed object."""
    return sorted({item.name for photo in load_photographs().values() for item in photo.objects})


def split_of(photograph: Photograph, window: Window) -> Split | None:
    """Split of a window by the held-out rule; None for a centre in the unused margin of a held-out cell."""
    height, width = photograph.pixels.shape[:2]
    col, in_col = divmod(window.centre[0] / width * GRID, 1)
    row, in_row = divmod(window.centre[1] / height * GRID, 1)
    if (row + 2 * col) % GRID != 0:
        return "train"
    return "heldout" if 0.25 <= in_col <= 0.75 and 0.25 <= in_row <= 0.75 else None


def crop(index: int, split: Split, seed: int = 0, size: int = 64) -> Crop:
    """Crop number `index` of a split: the same arguments always give the same crop.

    The photograph is index modulo their number, so consecutive indices visit all of them in turn.
    Raises ValueError for an unknown split or a negative index.
    """
    if split not in SPLIT_KEYS:
        raise ValueError(f"split is {split!r}; it must be 'train' or 'heldout'")
    if index < 0:
        raise ValueError(f"index is {index}; it must not be negative")
    photographs = list(load_photographs().values())
    photograph = photographs[index % len(photographs)]
    rng = np.random.default_rng([seed, SPLIT_KEYS[split], index])
    return sample_crop(photograph, rng, size, accept=lambda window: split_of(photograph, window) == split)


def sample_crop(
    photograph: Photograph,
    rng: np.random.Generator,
    size: int = 64,
    accept: Callable[[Window], bool] = lambda window: True,
) -> Crop:
    """Random square crop, antialiased down to size x size, mirrored half of the time.

    The window's side is uniform from `size` to the photograph's short side and its position uniform; windows
    are drawn again until `accept` takes one.
    """
    height, width = photograph.pixels.shape[:2]
    for _ in range(_MAX_DRAWS):
        side = int(rng.integers(size, min(height, width) + 1))
        x, y = int(rng.integers(0, width - side + 1)), int(rng.integers(0, height - side + 1))
        window = Window(x, y, side, flip=bool(rng.random() < 0.5))
        if accept(window):
            return cut(photograph, window, size)
    raise RuntimeError(f"no window of {photograph.name} was accepted in {_MAX_DRAWS} draws")


def cut(photograph: Photograph, window: Window, size: int = 64) -> Crop:
    """Crop of a given window, with its visible objects and captions."""
    x, y, side = window.x, window.y, window.side
    image = Image.fromarray(photograph.pixels[y : y + side, x : x + side])
    pixels = np.asarray(image.resize((size, size), Image.Resampling.BICUBIC))
    if window.flip:
        pixels = pixels[:, ::-1]
    visible = _visible_objects(photograph, window, size)
    captions = _compose(visible, size) if visible else _region_captions(photograph, window)
    boxes = tuple(VisibleObject(item.name, box) for item, box in visible)
    return Crop(np.ascontiguousarray(pixels), boxes, captions, photograph.name, window)


def _load(name: str, entry: dict) -> Photograph:
    # find_spec: locating the package's folder needs no import of its heavy modules.
    spec = importlib.util.find_spec(entry["package"])
    if spec is None or spec.origin is None:
        raise FileNotFoundError(f"photograph {name}: package {entry['package']} is not installed")
    path = Path(spec.origin).parent / _FOLDERS[entry["package"]] / entry["file"]
    if not path.is_file():
        raise FileNotFoundError(f"photograph {name}: no file {path}")
    pixels = np.asarray(Image.open(path).convert("RGB"))
    pixels.setflags(write=False)
    objects = tuple(
        PhotographedObject(item["name"], tuple(box), item["look"], item["detail"], item.get("cutout"))
        for item in entry["objects"]
        for box in item["boxes"]
    )
    regions = tuple(
        Region(tuple(r["box"]) if "box" in r else None, r["coarse"], r["middle"], r["detail"]) for r in entry["regions"]
    )
    return Photograph(name, pixels, objects, regions)


def _visible_objects(photograph: Photograph, window: Window, size: int) -> list[tuple[PhotographedObject, Box]]:
    """Objects of the crop with boxes in crop pixels, largest first.

    An object is visible when its part inside the window covers at least 4 % of it, and either half of the
    object is inside, or a quarter of it is and fills at least 60 % of the window (a close view).
    """
    scale = size / window.side
    found = []
    for item in photograph.objects:
        x0, x1 = (min(max(v - window.x, 0), window.side) for v in (item.box[0], item.box[2]))
        y0, y1 = (min(max(v - window.y, 0), window.side) for v in (item.box[1], item.box[3]))
        area = (x1 - x0) * (y1 - y0)
        inside = area / ((item.box[2] - item.box[0]) * (item.box[3] - item.box[1]))
        filled = area / window.side**2
        if filled >= 0.04 and (inside >= 0.5 or (inside >= 0.25 and filled >= 0.6)):
            if window.flip:
                x0, x1 = window.side - x1, window.side - x0
            found.append((area, item, (x0 * scale, y0 * scale, x1 * scale, y1 * scale)))
    found.sort(key=lambda entry: -entry[0])
    return [(item, box) for _, item, box in found]


def _compose(visible: list[tuple[PhotographedObject, Box]], size: int) -> Captions:
    """Coarse names up to three kinds of objects; middle and fine describe the largest object."""
    counts: dict[str, int] = {}
    for item, _ in visible:
        counts[item.name] = counts.get(item.name, 0) + 1
    names = list(counts)[:3]
    if len(names) == 3:
        coarse = f"{_article(names[0])} {names[0]}, {names[1]} and {names[2]}"
    else:
        coarse = " and ".join(f"{n}s" if counts[n] > 1 else f"{_article(n)} {n}" for n in names)
    item, box = visible[0]
    return Captions(coarse, f"{item.look} {_place(box, size)}", item.detail)


def _place(box: Box, size: int) -> str:
    middle = (box[0] + box[2]) / 2 / size
    return "at the left" if middle < 0.4 else "at the right" if middle > 0.6 else "in the middle"


def _article(noun: str) -> str:
    return "an" if noun[0] in "aeiou" else "a"


def _region_captions(photograph: Photograph, window: Window) -> Captions:
    x, y = window.centre
    for region in photograph.regions:
        if region.box is None or (region.box[0] <= x < region.box[2] and region.box[1] <= y < region.box[3]):
            return Captions(region.coarse, region.middle, region.detail)
    raise ValueError(f"photograph {photograph.name}: its last region in {MANIFEST.name} must have no box")
