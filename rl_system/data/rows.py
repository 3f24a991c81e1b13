"""Where images come from: a source gives rows, each an HQ image with its degraded LR image."""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from PIL import Image, UnidentifiedImageError

from rl_system.data.prepared import PreparedData
from vlcot.degradation.config import SEESR_TRAINING
from vlcot.degradation.pipeline import degrade
from vlcot.degradation.text import describe

Split = Literal["train", "heldout"]

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
HELDOUT_SHARE = 10
"""One image in ten of a folder is held out."""


@dataclass(frozen=True, eq=False)
class Row:
    """One training or held-out example.

    Attributes:
        row_id: unique in the data set.
        hq: uint8 [S, S, 3] RGB ground truth.
        lr: uint8 [S/4, S/4, 3] RGB.
        degradation: true description (:mod:`vlcot.degradation.text`).
        objects: names of the main objects, lower case; None where the source does not know them.
    """

    row_id: str
    hq: np.ndarray
    lr: np.ndarray
    degradation: str
    objects: tuple[str, ...] | None = None


class RowSource(Protocol):
    """Random access to the rows of two disjoint splits; deterministic."""

    def row(self, index: int, split: Split) -> Row:
        """Row ``index`` (any non-negative integer) of ``train`` or ``heldout``."""


class ToyPhotographs:
    """Crops of the photographs inside scikit-image and scikit-learn (``toy/rows.py``)."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def row(self, index: int, split: Split) -> Row:
        """See :class:`RowSource`."""
        from toy.rows import row  # the toy's photographs are only loaded where they are used

        toy = row(index, split, self._seed)
        return Row(toy.row_id, toy.hq, toy.lr, toy.degradation, toy.objects)


class ImageFolder:
    """Square crops of the images in a folder tree, degraded on the fly.

    An image belongs to the held-out split if the hash of its relative path says so, whatever else lies there.

    Args:
        folder: searched recursively for PNG, JPEG, WebP, BMP and TIFF files.
        size: side of the HQ crop in pixels; images with a shorter side are refused.
        tags: folder with a text file for each image, of the same relative path with the suffix ``.txt``: the names of
            its main objects, separated by commas, in the first line (SeeSR's and the authors' format). None: unknown.

    Raises:
        ValueError: a folder is missing or holds no image, an image cannot be read or is too small, tags are missing.
    """

    def __init__(self, folder: str, size: int, seed: int, tags: str | None = None) -> None:
        self._root, self._size, self._seed = Path(folder), size, seed
        if not self._root.is_dir():
            raise ValueError(f"data.path={folder}: no such folder")
        files = sorted(p for p in self._root.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
        if not files:
            raise ValueError(f"data.path={folder}: no image there ({', '.join(IMAGE_SUFFIXES)})")
        for path in files:
            self._check(path)
        self._objects = {path: self._tags(Path(tags), path) for path in files} if tags else {}
        self._splits: dict[str, list[Path]] = {"train": [], "heldout": []}
        for path in files:
            self._splits["heldout" if self._held_out(path) else "train"].append(path)
        for split, paths in self._splits.items():
            if not paths:
                raise ValueError(
                    f"data.path={folder}: {len(files)} images leave none for the {split} split "
                    f"(one in {HELDOUT_SHARE} is held out, by a hash of its name)"
                )

    def row(self, index: int, split: Split) -> Row:
        """See :class:`RowSource`; pass ``index // number of images`` over the folder draws new crops."""
        paths = self._splits[split]
        path = paths[index % len(paths)]
        rng = np.random.default_rng([self._seed, index, split == "heldout"])
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"))
        top, left = (int(rng.integers(0, side - self._size + 1)) for side in pixels.shape[:2])
        hq = pixels[top : top + self._size, left : left + self._size]
        if rng.random() < 0.5:
            hq = hq[:, ::-1]
        hq = np.ascontiguousarray(hq)
        lr, record = degrade(hq, SEESR_TRAINING, int(rng.integers(2**31)))
        name = f"{path.relative_to(self._root).as_posix()}#{index}"
        return Row(name, hq, lr, describe(record, SEESR_TRAINING), self._objects.get(path))

    def _held_out(self, path: Path) -> bool:
        return held_out(path.relative_to(self._root).as_posix())

    def _tags(self, folder: Path, image: Path) -> tuple[str, ...]:
        path = (folder / image.relative_to(self._root)).with_suffix(".txt")
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"data.tags={folder}: cannot read the tags of {image}: {error}") from error
        names = (" ".join(name.lower().split()) for name in (lines[0] if lines else "").split(","))
        return tuple(dict.fromkeys(name for name in names if name))

    def _check(self, path: Path) -> None:
        try:
            with Image.open(path) as image:
                width, height = image.size
        except (OSError, UnidentifiedImageError) as error:
            raise ValueError(f"cannot read the image {path}: {error}") from error
        if min(width, height) < self._size:
            raise ValueError(f"{path} is {width}x{height}; both sides must be at least {self._size} pixels")


class PreparedRows:
    """The rows of a prepared folder; the images held out are those that :class:`ImageFolder` holds out.

    Args:
        path: folder that ``rl-system prepare-data`` wrote.
        size: full size of the policy in pixels.
        with_objects: whether every row must name its main objects.

    Raises:
        ValueError: no prepared folder, another size, objects are missing, or a split is empty.
    """

    def __init__(self, path: str, size: int, with_objects: bool) -> None:
        try:
            self._data = PreparedData(path)
        except ValueError as error:
            raise ValueError(f"data.path={path}: {error}") from None
        if with_objects and None in self._data.column("objects"):
            raise ValueError(f"data.path={path} was prepared without objects; reward.objects=file needs them")
        self._splits = prepared_splits(self._data)
        for split, indices in self._splits.items():
            if not indices:
                raise ValueError(f"data.path={path}: {len(self._data)} rows leave none for the {split} split")
        found = self.row(0, "train").hq.shape[0]
        if found != size:
            raise ValueError(f"data.path={path} holds images of {found} pixels a side, the policy's have {size}")

    def row(self, index: int, split: Split) -> Row:
        """See :class:`RowSource`; beyond the last row of the split the first comes again."""
        indices = self._splits[split]
        row = self._data.row(indices[index % len(indices)])
        objects = None if row["objects"] is None else tuple(row["objects"])
        name = f"{row['image']}#{row['draw']}.{index}"
        return Row(name, _pixels(row["target"]), _pixels(row["lr"]), row["degradation"], objects)


def prepared_splits(data: PreparedData) -> dict[Split, list[int]]:
    """Rows of each split of a prepared folder."""
    splits: dict[Split, list[int]] = {"train": [], "heldout": []}
    for index, image in enumerate(data.column("image")):
        splits["heldout" if held_out(image) else "train"].append(index)
    return splits


def held_out(path: str) -> bool:
    """Whether an image belongs to the held-out split, by its path below the folder of all images."""
    digest = hashlib.blake2b(path.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % HELDOUT_SHARE == 0


def _pixels(png: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(png)) as image:
        return np.asarray(image.convert("RGB"))
