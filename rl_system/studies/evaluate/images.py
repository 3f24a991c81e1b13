"""Which image is compared with which: by name, complete, readable and of one size, or refused."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}
EIGHT_BIT = {"RGB", "RGBA", "L", "LA", "P"}
NAMES_SHOWN = 20


class EvaluationRefused(ValueError):
    """The input cannot be evaluated; the message says what is wrong and where."""


@dataclass(frozen=True)
class DataSet:
    """``references`` is the folder of ground truths, None for a set without."""

    name: str
    references: Path | None


@dataclass(frozen=True)
class Pair:
    """One image of a method's results, its name without suffix, and the reference of that name if there is one."""

    name: str
    result: Path
    reference: Path | None


def check_named(option: str, named: Sequence[tuple[str, Path | None]], folders: bool = False) -> None:
    """Raises EvaluationRefused if ``option`` was given one name twice, or no folder where it needs one."""
    names = [name for name, _ in named]
    if len(set(names)) < len(names):
        raise EvaluationRefused(f"{option} gives one name twice: {', '.join(names)}")
    for name, folder in named:
        if folders and folder is None:
            raise EvaluationRefused(f"{option} {name} has no folder; give {option} {name}=FOLDER")


def results_folder(method: Path, data_set: DataSet, data_sets: int) -> Path:
    """``METHOD/DATA``; with one data set, ``METHOD`` itself if it has no such folder."""
    inner = method / data_set.name
    return method if data_sets == 1 and not inner.is_dir() else inner


def pair_images(results: Path, data_set: DataSet, like: Path | None = None) -> list[Pair]:
    """The pairs of one method on one data set, sorted by name.

    Without references the names must be those of ``like``, the results of another method.

    Raises:
        EvaluationRefused: no folder, no images, two of one name, or names that do not match (all listed).
    """
    found = _images(results)
    expected = data_set.references or like
    if expected is None:
        return [Pair(name, found[name], None) for name in sorted(found)]
    wanted = _images(expected)
    missing, extra = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    if missing or extra:
        parts = [f"{len(missing)} missing: {_names(missing)}"] if missing else []
        parts += [f"{len(extra)} extra: {_names(extra)}"] if extra else []
        raise EvaluationRefused(
            f"{results} ({len(found)} images) does not match {expected} ({len(wanted)} images); {'; '.join(parts)}"
        )
    return [Pair(name, found[name], wanted[name] if data_set.references else None) for name in sorted(found)]


def read_rgb(path: Path) -> np.ndarray:
    """uint8 [H, W, 3]: gray repeated, alpha dropped, EXIF orientation applied, as cv2 reads for OSEDiff's script.

    Raises:
        EvaluationRefused: not an image, truncated, or not of 8 bits.
    """
    try:
        with Image.open(path) as image:
            if image.mode not in EIGHT_BIT:
                raise EvaluationRefused(f"{path} has pixels of kind {image.mode}; only 8-bit RGB or gray is read")
            return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise EvaluationRefused(f"cannot read the image {path}: {error}") from error


def check_pair(pair: Pair) -> None:
    """Raises EvaluationRefused if an image cannot be read or its size is not that of its reference."""
    size = read_rgb(pair.result).shape[:2]
    if pair.reference is not None:
        wanted = read_rgb(pair.reference).shape[:2]
        if size != wanted:
            raise EvaluationRefused(
                f"{pair.result} is {size[1]}x{size[0]}, its reference {pair.reference} {wanted[1]}x{wanted[0]}; "
                "both must be of one size"
            )


def _images(folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        raise EvaluationRefused(f"there is no folder {folder}")
    found: dict[str, Path] = {}
    try:
        files = sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES and not p.name.startswith("."))
    except OSError as error:
        raise EvaluationRefused(f"cannot read the folder {folder}: {error.strerror}") from error
    for path in files:
        if path.stem in found:
            raise EvaluationRefused(f"{folder} has two images named {path.stem}: {found[path.stem].name}, {path.name}")
        found[path.stem] = path
    if not found:
        raise EvaluationRefused(f"there are no images in {folder} (looked for {', '.join(sorted(SUFFIXES))})")
    return found


def _names(names: Iterable[str]) -> str:
    names = list(names)
    more = f", and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return ", ".join(names[:NAMES_SHOWN]) + more
