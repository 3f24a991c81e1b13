"""Which photographs are prepared, and which shard each belongs to.

The plan is a file that only grows: photographs that come later get shards of their own behind the others. So a run that
goes on, with any number of workers, makes the same shards, and a row keeps its id.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from rl_system.data.rows import IMAGE_SUFFIXES
from rl_system.runs.files import write_json

PLAN = "plan.json"


@dataclass(frozen=True)
class Photograph:
    """A file below the input folder: relative path, bytes."""

    path: str
    size: int


@dataclass(frozen=True)
class Skipped:
    """A file that was left out, and why."""

    path: str
    reason: str


@dataclass(frozen=True)
class Shard:
    """Photographs of one shard; ``first`` is the number of the first among all."""

    number: int
    first: int
    photographs: tuple[Photograph, ...]

    @property
    def name(self) -> str:
        """Name of its file."""
        return f"shard-{self.number:05d}.parquet"


def scan(folder: Path, min_pixels: int, min_bytes: float) -> tuple[list[Photograph], list[Skipped]]:
    """Photographs below ``folder`` in the order of their paths, and what was left out.

    Only headers are read; a file whose pixels cannot be read is found when its shard is made.
    """
    kept, skipped = [], []
    for path in sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES):
        name = path.relative_to(folder).as_posix()
        try:
            size = path.stat().st_size
            with Image.open(path) as image:
                pixels = image.width * image.height
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            skipped.append(Skipped(name, f"cannot be read: {_said(error)}"))
            continue
        if size < min_bytes:
            skipped.append(Skipped(name, f"{size} bytes, fewer than min_file_kib"))
        elif pixels < min_pixels:
            skipped.append(Skipped(name, f"{pixels} pixels, fewer than min_pixels"))
        else:
            kept.append(Photograph(name, size))
    return kept, skipped


def extended(output: Path, found: Sequence[Photograph], per_shard: int) -> list[Shard]:
    """The plan of ``output``, with the photographs that are new in shards behind the others; written to its file.

    Raises:
        ValueError: a photograph of the plan is gone or another one now.
    """
    path = output / PLAN
    shards = list(_read(path)) if path.is_file() else []
    planned = {photo.path: photo for shard in shards for photo in shard.photographs}
    now = {photo.path: photo for photo in found}
    for name, photo in planned.items():
        if now.get(name) != photo:
            raise ValueError(
                f"{name} was prepared before and is gone or changed now; a prepared folder only grows: put it back, "
                "or choose another output"
            )
    new = [photo for photo in found if photo.path not in planned]
    first = len(planned)
    for start in range(0, len(new), per_shard):
        part = tuple(new[start : start + per_shard])
        shards.append(Shard(len(shards), first + start, part))
    write_json(path, [[[photo.path, photo.size] for photo in shard.photographs] for shard in shards])
    return shards


def _read(path: Path) -> Iterator[Shard]:
    first = 0
    for number, entries in enumerate(json.loads(path.read_text(encoding="utf-8"))):
        photographs = tuple(Photograph(name, size) for name, size in entries)
        yield Shard(number, first, photographs)
        first += len(photographs)


def _said(error: Exception) -> str:
    return " ".join(str(error).split()).split(" '/")[0] or type(error).__name__
