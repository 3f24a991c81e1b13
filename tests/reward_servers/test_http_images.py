"""Images over HTTP: exact both ways, and every hostile one refused before it is decoded, with what was wrong."""

from __future__ import annotations

import base64
import io
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image, ImageFile
from pydantic import ValidationError

from reward_servers.http_images import LIMITS, ImagePayload, decode_mask, decode_png, encode_mask

pytestmark = pytest.mark.unit

PICTURE = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)


def png(array: np.ndarray, mode: str | None = None, **options) -> bytes:
    buffer = io.BytesIO()
    image = Image.fromarray(array)
    (image.convert(mode) if mode else image).save(buffer, "PNG", **options)
    return buffer.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def with_header(
    width: int, height: int, depth: int = 8, kind: int = 2, data: bytes = b"", interlaced: int = 0, cut: int = 0
) -> bytes:
    """A PNG of rows that may be others than the header says; the last ``cut`` bytes of their stream are missing."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, interlaced))
    rows = zlib.compress(data)
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", rows[: len(rows) - cut]) + chunk(b"IEND", b"")


def inserted(data: bytes, extra: bytes) -> bytes:
    """After the header."""
    return data[:33] + extra + data[33:]


@settings(max_examples=50, deadline=None)
@given(arrays(np.uint8, st.tuples(st.integers(1, 9), st.integers(1, 9), st.just(3))))
def test_bytes_in_are_bytes_scored_raw_and_png(image):
    np.testing.assert_array_equal(ImagePayload.of(image).array(), image)
    payload = ImagePayload(png=base64.b64encode(png(image)).decode())
    np.testing.assert_array_equal(payload.array(), image)
    again = ImagePayload.model_validate_json(ImagePayload.of(image).model_dump_json())
    np.testing.assert_array_equal(again.array(), image)


@pytest.mark.parametrize("shape", [(1, 1), (8, 13)])
def test_masks_survive(shape):
    mask = np.random.default_rng(1).random(shape) > 0.5
    np.testing.assert_array_equal(decode_mask(encode_mask(mask)), mask)
    with pytest.raises(ValueError, match="one bit per pixel"):
        decode_mask(base64.b64encode(png(PICTURE)).decode())


BOMB = with_header(30_000, 30_000, data=bytes(1000))
HOSTILE = {
    "decompression bomb": (BOMB, "30000 x 30000 pixels is too large"),
    "30,000 px wide": (png(np.zeros((2, 30_000, 3), np.uint8)), "30000 x 2 pixels is too large"),
    "too many pixels": (with_header(8192, 8192), "too large"),
    "no pixels": (with_header(0, 5), "too large or empty"),
    "truncated": (png(PICTURE)[:-20], "truncated"),
    "truncated in a chunk's head": (png(PICTURE)[:-9], "truncated"),
    "only a header": (png(PICTURE)[:33], "truncated"),
    "pixels are missing": (with_header(5, 5, data=bytes(10)), "pixels are missing"),
    "too many pixels for its header": (with_header(5, 5, data=bytes(81)), "more pixels than its header"),
    "its rows do not end": (with_header(5, 5, data=bytes(80), cut=3), "pixels are missing"),
    "rows that zlib did not write": (inserted(with_header(5, 5, data=bytes(80)), chunk(b"IDAT", b"?" * 9)), "broken"),
    "interlaced": (with_header(5, 5, data=bytes(80), interlaced=1), "interlaced"),
    "16-bit": (with_header(2, 2, depth=16), "16-bit RGB; send 8-bit RGB"),
    "palette": (png(PICTURE, "P"), "palette; send 8-bit RGB"),
    "RGBA": (png(PICTURE, "RGBA"), "RGB with alpha; send 8-bit RGB"),
    "greyscale": (png(PICTURE, "L"), "greyscale; send 8-bit RGB"),
    "transparent colour": (inserted(png(PICTURE), chunk(b"tRNS", bytes(6))), "transparency"),
    "animated": (inserted(png(PICTURE), chunk(b"acTL", struct.pack(">II", 2, 0))), "animated"),
    "two headers": (inserted(png(PICTURE), png(np.zeros((9, 9, 3), np.uint8))[8:33]), "two headers"),
    "wrong checksum": (png(PICTURE)[:40] + b"?" + png(PICTURE)[41:], "wrong checksum"),
    "something after the end": (png(PICTURE) + b"MZ", "2 bytes follow"),
    "JPEG": (b"\xff\xd8\xff\xe0" + bytes(100), "no PNG file"),
    "nothing": (b"", "no PNG file"),
    "half a header": (b"\x89PNG\r\n\x1a\n" + bytes(10), "no header"),
}


@pytest.mark.parametrize(("data", "said"), HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_file_is_refused_with_what_is_wrong(data, said):
    with pytest.raises(ValueError, match=said):
        decode_png(data)


def test_missing_pixels_are_refused_whatever_another_library_told_pillow(monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(ValueError, match="pixels are missing"):
        decode_png(HOSTILE["pixels are missing"][0])


def test_a_zip_bomb_behind_a_small_header_never_unpacks():
    """50 MB of zeros in 50 kB."""
    data = with_header(4, 4, data=bytes(50_000_000))
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="more pixels than its header"):
            decode_png(data)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert len(data) < 100_000 and peak < 5_000_000


@settings(max_examples=100, deadline=None)
@given(st.integers(0, len(png(PICTURE)) - 1), st.integers(0, 255))
def test_a_changed_byte_never_gives_other_pixels(place, value):
    data = bytearray(png(PICTURE))
    data[place] = value
    try:
        found = decode_png(bytes(data))
    except ValueError:
        return
    np.testing.assert_array_equal(found, PICTURE)


@pytest.mark.parametrize(
    ("payload", "said"),
    [
        ({}, "either 'png' or 'raw'"),
        ({"png": "AAAA", "raw": "AAAA"}, "either 'png' or 'raw'"),
        ({"png": "AAAA", "width": 1}, "belong to 'raw'"),
        ({"raw": "AAAA"}, "needs 'height' and 'width'"),
        ({"raw": "AAAA", "height": 2, "width": 2}, "3 bytes; 2 x 2 RGB has 12"),
        ({"raw": "AAAA", "height": 8192, "width": 8192}, "too large"),
        ({"png": "/etc/passwd"}, "no PNG file|no base64"),
        ({"png": "file:///etc/passwd"}, "no base64; send the file's bytes, not a path"),
        ({"png": "http://169.254.169.254/"}, "no base64"),
    ],
)
def test_a_payload_that_is_no_image_is_refused(payload, said):
    with pytest.raises(ValueError, match=said):
        ImagePayload(**payload).array()


@pytest.mark.parametrize(
    "payload",
    [
        {"path": "/etc/passwd"},
        {"raw": "AAAA", "height": "1", "width": 1},
        {"raw": "AAAA", "height": -1, "width": 1},
        {"raw": "AAAA", "height": LIMITS.side + 1, "width": 1},
        {"png": 5},
        {"png": "AAAA", "pickle": "AAAA"},
    ],
)
def test_unknown_fields_and_wrong_types_are_invalid(payload):
    with pytest.raises(ValidationError):
        ImagePayload(**payload)


@pytest.mark.parametrize("image", [PICTURE.astype(np.float32), PICTURE[..., 0], PICTURE[:0], PICTURE[..., :2]])
def test_only_images_are_encoded(image):
    with pytest.raises(ValueError, match="uint8"):
        ImagePayload.of(image)
