"""Pictures of a chain: as PNG files and back, and inside an HTML file."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from rl_system.runs.files import write_atomic

STAGES = ("coarse", "middle", "final")
_LOSSLESS_SIDE = 96
_LARGEST_SIDE = 256
_JPEG_QUALITY = 88


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
    """Write the images that exist as ``PREFIX_{coarse,middle,final}.png``; stage -> file name. The last is final."""
    names: dict[str, str] = {}
    for stage, image in zip(STAGES[-len(images) :], images, strict=True):
        if image is not None:
            names[stage] = f"{prefix}_{stage}.png"
            write_png(folder / names[stage], image)
    return names


class PictureInliner:
    """Makes data URIs until ``budget`` bytes are spent; then a picture is left out, and its URI is empty.

    Pictures with sides up to 96 pixels stay lossless, larger ones become JPEG of at most 256 pixels a side.
    """

    def __init__(self, budget: int) -> None:
        self._left = budget

    def inline(self, image: np.ndarray) -> str:
        """Data URI of uint8 [H, W, 3] RGB."""
        return self._encode(Image.fromarray(image))

    def inline_bicubic(self, image: np.ndarray, side: int) -> str:
        """Data URI of ``image`` up-scaled to ``side`` pixels by bicubic interpolation."""
        return self._encode(Image.fromarray(image).resize((side, side), Image.Resampling.BICUBIC))

    def inline_file(self, folder: Path, name: str | None) -> str | None:
        """Data URI of a PNG file; None for None."""
        return None if name is None else self.inline(read_png(folder / name))

    def _encode(self, image: Image.Image) -> str:
        buffer = BytesIO()
        lossless = max(image.size) <= _LOSSLESS_SIDE
        if lossless:
            image.save(buffer, "PNG", optimize=True)
        else:
            image.thumbnail((_LARGEST_SIDE, _LARGEST_SIDE), Image.Resampling.LANCZOS)
            image.save(buffer, "JPEG", quality=_JPEG_QUALITY)
        uri = f"data:image/{'png' if lossless else 'jpeg'};base64,{base64.b64encode(buffer.getvalue()).decode()}"
        if len(uri) > self._left:
            return ""
        self._left -= len(uri)
        return uri
