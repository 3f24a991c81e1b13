"""Photographs and three methods' results of them, in folders as `rl-system study` takes them."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from PIL import Image
from skimage import data

REALSR = Path(os.environ.get("REALSR", "/work/shared/data/realsr"))
METHODS = ("bicubic", "lanczos", "nearest")
_WITHIN_SKIMAGE = ("astronaut", "cat", "coffee", "rocket")


def photographs(number: int, size: int) -> dict[str, Image.Image]:
    """``number`` (up to 4) RGB photographs of ``size`` pixels: RealSR's where they are, else scikit-image's."""
    files = sorted((REALSR / "test_LR").glob("*.png"))[::7][:number]
    found = {path.stem: Image.open(path).convert("RGB") for path in files}
    if not found:
        found = {name: Image.fromarray(np.asarray(getattr(data, name)())) for name in _WITHIN_SKIMAGE[:number]}
    return {name: image.crop((0, 0, size, size)) for name, image in found.items()}


def write_folders(root: Path, number: int, size: int, scale: int = 4) -> list[str]:
    """Write ``lr`` and a folder per method of :data:`METHODS` to ``root``; the command's arguments for them."""
    for folder in ("lr", *METHODS):
        (root / folder).mkdir()
    for name, image in photographs(number, size).items():
        image.save(root / "lr" / f"{name}.png")
        for method in METHODS:
            result = image.resize((size * scale, size * scale), Image.Resampling[method.upper()])
            result.save(root / method / f"{name}.png")
    methods = [part for method in METHODS for part in ("--method", f"{method}={root / method}")]
    return ["--data", f"Photos={root / 'lr'}", *methods]
