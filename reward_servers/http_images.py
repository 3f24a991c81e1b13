"""Images in JSON: PNG or raw bytes in base64, checked before a pixel is decoded.

What is sent is what is scored: 8-bit RGB only, nothing is converted, no gamma or colour profile is applied.
"""

from __future__ import annotations

import base64
import binascii
import io
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_HEADER_TEXT = 44
"""Characters of base64 that hold the signature and the header chunk, 33 bytes."""
_KINDS = {0: "greyscale", 2: "RGB", 3: "palette", 4: "greyscale with alpha", 6: "RGB with alpha"}
"""Colour types of the PNG specification, section 11.2.2."""


@dataclass(frozen=True)
class Limits:
    """What a request may hold at most.

    Attributes:
        side: pixels of an image's longer side.
        pixels: of one image.
        images: restorations of one request.
        request_pixels: of all images of a request together; a small PNG can hold many.
        names: to look for.
        body_bytes: of the whole request, JSON and base64 included.
        body_s: seconds that a request's body may take to arrive.
    """

    side: int = 8192
    pixels: int = 4096 * 4096
    images: int = 64
    request_pixels: int = 4 * 4096 * 4096
    names: int = 2048
    body_bytes: int = 256 * 2**20
    body_s: float = 30.0


LIMITS = Limits()


class ImagePayload(BaseModel):
    """One image uint8 [H, W, 3] RGB: either ``png``, or ``raw`` rows with ``height`` and ``width``; base64 each."""

    model_config = ConfigDict(extra="forbid", strict=True)
    png: Annotated[str, Field(min_length=1, description="8-bit RGB PNG, base64")] | None = None
    raw: Annotated[str, Field(min_length=1, description="height * width * 3 bytes, base64")] | None = None
    height: Annotated[int, Field(ge=1, le=LIMITS.side)] | None = None
    width: Annotated[int, Field(ge=1, le=LIMITS.side)] | None = None

    @classmethod
    def of(cls, image: np.ndarray) -> ImagePayload:
        """Raw: exact, and cheaper than PNG inside a cluster. Raises ValueError unless uint8 [H, W, 3]."""
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or image.size == 0:
            raise ValueError(f"an image must be uint8 [H, W, 3], got {image.dtype} {list(image.shape)}")
        height, width, _ = image.shape
        return cls(raw=base64.b64encode(image.tobytes()).decode(), height=height, width=width)

    def pixels(self) -> int:
        """How many it claims to have, read without decoding any. Raises ValueError as :meth:`array` does."""
        if self.png is not None:
            width, height = _check_header(_base64("png", self.png[:_HEADER_TEXT]))
            return width * height
        return (self.height or 0) * (self.width or 0)  # array() says which is missing

    def array(self) -> np.ndarray:
        """The pixels. Raises ValueError for whatever is no such image, or too large; names what came."""
        if (self.png is None) == (self.raw is None):
            raise ValueError("an image needs either 'png' or 'raw' with 'height' and 'width'")
        if self.png is not None:
            if self.height is not None or self.width is not None:
                raise ValueError("'height' and 'width' belong to 'raw'; a PNG has its own")
            return decode_png(_base64("png", self.png))
        if self.height is None or self.width is None:
            raise ValueError("'raw' needs 'height' and 'width'")
        assert self.raw is not None
        _check_size(self.height, self.width)
        data = _base64("raw", self.raw)
        wanted = self.height * self.width * 3
        if len(data) != wanted:
            raise ValueError(f"'raw' has {len(data)} bytes; {self.height} x {self.width} RGB has {wanted}")
        return np.frombuffer(data, dtype=np.uint8).reshape(self.height, self.width, 3)


def decode_png(data: bytes) -> np.ndarray:
    """uint8 [H, W, 3]. The header is judged first, so that a small file cannot become a huge image.

    Raises:
        ValueError: no PNG, of another kind than 8-bit RGB, too large, interlaced, animated, or broken.
    """
    width, height = _check_header(data)
    # Pillow fills missing pixels with grey once any library has set its LOAD_TRUNCATED_IMAGES, as parts of pyiqa do.
    _check_stream(_check_chunks(data), height * (1 + 3 * width))
    try:
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            image.load()
            pixels = np.asarray(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"the PNG is broken: {error}") from None
    if pixels.shape != (height, width, 3) or pixels.dtype != np.uint8:
        raise ValueError(f"the PNG's pixels are {pixels.dtype} {list(pixels.shape)}, not 8-bit RGB")
    return pixels


def encode_mask(mask: np.ndarray) -> str:
    """bool [H, W] as a 1-bit PNG, base64."""
    buffer = io.BytesIO()
    Image.fromarray(mask).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def decode_mask(text: str) -> np.ndarray:
    """bool [H, W]. Raises ValueError if it is none."""
    try:
        with Image.open(io.BytesIO(_base64("mask", text)), formats=["PNG"]) as image:
            if image.mode != "1":
                raise ValueError(f"a mask has one bit per pixel, got mode {image.mode}")
            return np.asarray(image)
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"the mask is no PNG: {error}") from None


def _check_header(data: bytes) -> tuple[int, int]:
    """Width and height."""
    if not data.startswith(_SIGNATURE):
        raise ValueError("'png' holds no PNG file (its first bytes are others)")
    if len(data) < 33 or data[12:16] != b"IHDR" or data[8:12] != b"\x00\x00\x00\x0d":
        raise ValueError("the PNG is broken: it has no header")
    width, height, depth, kind, _, _, interlaced = struct.unpack(">IIBBBBB", data[16:29])
    if depth != 8 or kind != 2:
        raise ValueError(f"the PNG is {depth}-bit {_KINDS.get(kind, f'of kind {kind}')}; send 8-bit RGB without alpha")
    if interlaced:
        raise ValueError("the PNG is interlaced; send its rows in order")
    _check_size(height, width)
    return width, height


def _check_stream(parts: Sequence[memoryview], wanted: int) -> None:
    """The compressed rows unpack to ``wanted`` bytes, which the header promises: no fewer, and no more is unpacked."""
    stream, unpacked = zlib.decompressobj(), 0
    try:
        for part in parts:
            unpacked += len(stream.decompress(part, wanted + 1 - unpacked))
            if unpacked > wanted:
                raise ValueError("the PNG is broken: it holds more pixels than its header says")
    except zlib.error as error:
        raise ValueError(f"the PNG is broken: {error}") from None
    if unpacked < wanted or not stream.eof:
        raise ValueError("the PNG is broken: pixels are missing")


def _check_chunks(data: bytes) -> list[memoryview]:
    """Every chunk is whole and has its checksum; none animates, makes transparent, or follows the end.

    Returns:
        The compressed rows, in pieces.
    """
    rows: list[memoryview] = []
    place = len(_SIGNATURE)
    while place < len(data):
        if place + 12 > len(data):
            raise ValueError("the PNG is truncated")
        (length,) = struct.unpack(">I", data[place : place + 4])
        end = place + 12 + length
        if end > len(data):
            raise ValueError("the PNG is truncated")
        kind = data[place + 4 : place + 8]
        if zlib.crc32(data[place + 4 : end - 4]) != struct.unpack(">I", data[end - 4 : end])[0]:
            raise ValueError(f"the PNG is broken: wrong checksum of its {kind.decode('latin-1')} chunk")
        if kind == b"IHDR" and place != len(_SIGNATURE):
            raise ValueError("the PNG is broken: it has two headers")  # Pillow would believe the second
        if kind == b"acTL":
            raise ValueError("the PNG is animated; send one picture")
        if kind == b"tRNS":
            raise ValueError("the PNG has transparency; send 8-bit RGB without alpha")
        if kind == b"IEND":
            if end != len(data):
                raise ValueError(f"{len(data) - end} bytes follow the PNG's end")
            return rows
        if kind == b"IDAT":
            rows.append(memoryview(data)[place + 8 : end - 4])
        place = end
    raise ValueError("the PNG is truncated")


def _check_size(height: int, width: int) -> None:
    if not (height >= 1 and width >= 1) or max(height, width) > LIMITS.side or height * width > LIMITS.pixels:
        raise ValueError(
            f"an image of {width} x {height} pixels is too large or empty: at most {LIMITS.side} on a side and "
            f"{LIMITS.pixels} in all"
        )


def _base64(name: str, text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise ValueError(f"'{name}' is no base64; send the file's bytes, not a path or an address") from None
