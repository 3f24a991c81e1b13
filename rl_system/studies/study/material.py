"""What participants compare: photographs and every method's result of each, checked before anyone sees one."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from rl_system.studies.evaluate.images import DataSet, EvaluationRefused, pair_images, read_rgb, results_folder

MOST_METHODS = 9  # a key each


@dataclass(frozen=True)
class Item:
    """One photograph and its results, a path per method, in the order of the methods."""

    data_set: str
    name: str
    photograph: Path
    results: tuple[Path, ...]


@dataclass(frozen=True)
class Material:
    """``digests`` has a SHA-256 per item, of the pixels of the photograph and of every result."""

    methods: tuple[str, ...]
    items: tuple[Item, ...]
    digests: tuple[str, ...]


def collect(data: Sequence[tuple[str, Path]], methods: Sequence[tuple[str, Path]]) -> Material:
    """Pair photographs and results by name and decode every image.

    Args:
        data: name and folder of photographs of each data set.
        methods: name and folder of results of each method, as ``rl-system evaluate`` takes them.

    Raises:
        EvaluationRefused: fewer than two methods or more than nine; names that do not match; an image that cannot be
            read; results of one photograph that differ in size.
    """
    if not 2 <= len(methods) <= MOST_METHODS:
        raise EvaluationRefused(f"a study compares 2 to {MOST_METHODS} methods, {len(methods)} given")
    items = []
    for data_set in (DataSet(*named) for named in data):
        folders = [results_folder(folder, data_set, len(data)) for _, folder in methods]
        for pairs in zip(*(pair_images(folder, data_set) for folder in folders), strict=True):
            photograph = pairs[0].reference
            assert photograph is not None  # pair_images gives one where the data set has a folder
            items.append(Item(data_set.name, pairs[0].name, photograph, tuple(pair.result for pair in pairs)))
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        digests = tuple(pool.map(_digest, items))
    return Material(tuple(name for name, _ in methods), tuple(items), digests)


def order_for(participant: str, seed: int, items: int, methods: int) -> list[tuple[int, tuple[int, ...]]]:
    """The order in which a participant sees items, each with the order of its methods; random, the same every time."""
    rng = np.random.default_rng([seed, *participant.encode()])
    return [(int(item), tuple(int(m) for m in rng.permutation(methods))) for item in rng.permutation(items)]


def plain_png(path: Path) -> bytes:
    """The pixels of an image as PNG: no metadata, format or file size of the method's own comes with them.

    Raises:
        EvaluationRefused: it cannot be read any more.
    """
    encoded = io.BytesIO()
    Image.fromarray(read_rgb(path)).save(encoded, "PNG", compress_level=1)
    return encoded.getvalue()


def _digest(item: Item) -> str:
    digest = hashlib.sha256()
    sizes = set()
    for path in (item.photograph, *item.results):
        pixels = read_rgb(path)
        digest.update(f"{pixels.shape}".encode())
        digest.update(pixels.tobytes())
        if path != item.photograph:
            sizes.add(pixels.shape[:2])
    if len(sizes) > 1:
        shown = ", ".join(f"{path}" for path in item.results)
        raise EvaluationRefused(f"results of {item.name} differ in size, which would give them away: {shown}")
    return digest.hexdigest()
