"""Pictures of a chain as PNG files and back."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from rl_system.runs.files import write_atomic

STAGES = ("coarse", "middle", "final")


def write_png(path: Path, image: np.ndarray) -> None:
    """Write uint8 [H, W, 3] RGB losslessly and atomically."""
    buffer = BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    write_atomic(path, buffer.getvalue())


def read_png(path: Path) -> np.ndarray:
    """uint8 [H, W, 3] RGB."""
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def write_chain_pictures(folder: Path, prefix: str, images: Sequence[np.ndarray | None]) -> dict[str, str]:
    """Write the images that exist as ``PREFIX_{coarse,middle,final}.png``; stage -> file name."""
    names: dict[str, str] = {}
    for stage, image in zip(STAGES, images, strict=True):
        if image is not None:
            names[stage] = f"{prefix}_{stage}.png"
            write_png(folder / names[stage], image)
    return names
