"""Photographs as people have them: any bit depth, alpha, colour profile and orientation, and PNG files of the like.

Pillow reads all but 16-bit colour, which it would cut to 8 bits; that is read and written by OpenCV.
"""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageCms, ImageOps

from rl_system.runs.files import write_atomic

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_TIFF_BITS = 258
_ORIENTATION = 274
_UPRIGHT: Mapping[int, Callable[[np.ndarray], np.ndarray]] = {
    2: np.fliplr,
    3: lambda stored: np.rot90(stored, 2),
    4: np.flipud,
    5: lambda stored: np.swapaxes(stored, 0, 1),
    6: lambda stored: np.rot90(stored, -1),
    7: lambda stored: np.swapaxes(np.rot90(stored, 2), 0, 1),
    8: lambda stored: np.rot90(stored, 1),
}
"""What turns a picture upright, by EXIF's number of how it is stored."""
_FULL = {8: 255, 16: 65535}


class ImageRefused(ValueError):
    """A file that cannot be restored; the message says why."""


@dataclass(frozen=True, eq=False)
class Photograph:
    """One picture, upright.

    Attributes:
        colour: uint8 or uint16 [H, W, 3] RGB; a gray picture has three equal channels.
        alpha: [H, W] of the same type, None for an opaque picture.
        gray: it has no colour, and is to be written without.
        profile: its ICC profile, None without.
        notes: what of the file is not in here, to be said to the user.
    """

    colour: np.ndarray
    alpha: np.ndarray | None = None
    gray: bool = False
    profile: bytes | None = None
    notes: tuple[str, ...] = ()

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.colour.shape[0], self.colour.shape[1]

    @property
    def bits(self) -> int:
        """8 or 16."""
        return 8 * self.colour.dtype.itemsize


def read_size(path: Path) -> tuple[int, int] | None:
    """Height and width of the upright picture from the file's header alone; None if it cannot be told."""
    try:
        with Image.open(path) as image:
            turned = _orientation(image) in (5, 6, 7, 8)
            return (image.width, image.height) if turned else (image.height, image.width)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None


def read_photograph(path: Path) -> Photograph:
    """Read any file that Pillow knows.

    Raises:
        ImageRefused: not an image, truncated, empty, unreadable, or of a kind of pixels that has no 8 or 16 bits.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ImageRefused(f"cannot be read: {error.strerror or error}") from error
    if not data:
        raise ImageRefused("the file is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, of odd but readable files
            with Image.open(io.BytesIO(data)) as image:
                photograph = _deep(data, image) if _bits(data, image) == 16 else _shallow(image)
    except ImageRefused:
        raise
    except Image.UnidentifiedImageError as error:
        raise ImageRefused("is not an image") from error
    except Exception as error:  # decoders fail in as many ways as there are broken files
        raise ImageRefused(f"cannot be decoded: {str(error) or type(error).__name__}") from error
    return photograph


def enlarged(channels: np.ndarray, height: int, width: int) -> np.ndarray:
    """float32 [height, width, ...] in [0, 1]: Pillow's bicubic of uint8, uint16 or float [h, w] or [h, w, 3].

    uint8 colour is resized as such, as :func:`vlcot.images.upscale_for_policy` does it for training.
    """
    size, kind = (width, height), Image.Resampling.BICUBIC
    if channels.dtype == np.uint8:
        return np.asarray(Image.fromarray(channels).resize(size, kind), np.float32) / np.float32(255)
    values = channels.astype(np.float32) / (65535 if channels.dtype == np.uint16 else 1)
    planes = values[..., None] if values.ndim == 2 else values
    resized = [np.asarray(Image.fromarray(p).resize(size, kind)) for p in np.moveaxis(planes, -1, 0).copy()]
    stacked = np.clip(np.stack(resized, axis=-1), 0, 1)
    return stacked[..., 0] if values.ndim == 2 else stacked


def to_bits(values: np.ndarray, bits: int) -> np.ndarray:
    """Values in [0, 1] as the nearest uint8 or uint16."""
    return np.rint(values * np.float64(_FULL[bits])).astype(np.uint8 if bits == 8 else np.uint16)


def like(original: Photograph, colour: np.ndarray) -> Photograph:
    """``colour``, float [H, W, 3] in [0, 1], with bits, alpha (bicubic), gray and profile of ``original``."""
    alpha = original.alpha
    if alpha is not None:
        alpha = to_bits(enlarged(alpha, *colour.shape[:2]), original.bits)
    if original.gray:  # Rec. 601, as Pillow turns colour into gray
        luma = colour @ np.array([0.299, 0.587, 0.114], colour.dtype)
        colour = np.repeat(luma[..., None], 3, axis=-1)
    return replace(original, colour=to_bits(colour, original.bits), alpha=alpha)


def write_photograph(path: Path, photograph: Photograph) -> None:
    """Write a PNG, atomically: gray, alpha, bit depth and profile as they are.

    Raises:
        OSError: the file cannot be written.
    """
    channels = [photograph.colour[..., :1] if photograph.gray else photograph.colour]
    if photograph.alpha is not None:
        channels.append(photograph.alpha[..., None])
    pixels = np.concatenate(channels, axis=-1)
    encode = _png_8 if photograph.bits == 8 else _png_16
    write_atomic(path, encode(pixels, photograph.profile))


def _bits(data: bytes, image: Image.Image) -> int:
    """Bits of a channel in the file, 16 at most."""
    if data.startswith(PNG_SIGNATURE):
        return data[24]  # IHDR: width, height, depth
    if image.format == "TIFF":
        return int(max(image.tag_v2.get(_TIFF_BITS, (8,))))  # type: ignore[attr-defined]
    return 16 if image.mode.startswith("I;16") else 8


def _orientation(image: Image.Image) -> int:
    """EXIF's number of how the picture is stored; Pillow and OpenCV both turn a TIFF upright by themselves."""
    return 1 if image.format == "TIFF" else image.getexif().get(_ORIENTATION, 1)


def _shallow(image: Image.Image) -> Photograph:
    notes = []
    if getattr(image, "n_frames", 1) > 1:
        notes.append(f"only the first of {image.n_frames} frames is restored")  # type: ignore[attr-defined]
        image.seek(0)
    if image.mode in ("I", "F"):
        raise ImageRefused(f"has pixels of kind {image.mode}; 8 and 16 bits can be restored")
    image.load()
    profile = image.info.get("icc_profile") or None
    image = ImageOps.exif_transpose(image)
    if image.mode == "CMYK":
        image, note = _without_ink(image, profile)
        notes.append(note)
        profile = None
    gray = image.mode in ("1", "L", "LA", "La")
    clear = image.mode in ("LA", "La", "RGBA", "RGBa", "PA") or "transparency" in image.info
    pixels = np.asarray(image.convert("RGBA" if clear else "RGB"))
    return Photograph(
        colour=np.ascontiguousarray(pixels[..., :3]),
        alpha=np.ascontiguousarray(pixels[..., 3]) if clear else None,
        gray=gray,
        profile=profile,
        notes=tuple(notes),
    )


def _without_ink(image: Image.Image, profile: bytes | None) -> tuple[Image.Image, str]:
    """CMYK as sRGB: by its profile where it has one that works."""
    if profile is not None:
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            converted = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
        except (OSError, ImageCms.PyCMSError):
            return image.convert("RGB"), "CMYK was converted to sRGB; its profile could not be used"
        if converted is not None:
            return converted, "CMYK was converted to sRGB by its profile"
    return image.convert("RGB"), "CMYK was converted to sRGB; it had no profile"


def _deep(data: bytes, image: Image.Image) -> Photograph:
    image.load()  # OpenCV would say nothing of a file that is cut off
    profile = image.info.get("icc_profile") or None
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)  # as stored, not turned upright
    if pixels is None or pixels.dtype != np.uint16:
        raise ImageRefused("has 16-bit pixels of a kind that cannot be decoded")
    pixels = _UPRIGHT.get(_orientation(image), np.asarray)(pixels)
    gray = pixels.ndim == 2
    colour = np.repeat(pixels[..., None], 3, axis=-1) if gray else np.ascontiguousarray(pixels[..., 2::-1])
    alpha = np.ascontiguousarray(pixels[..., 3]) if not gray and pixels.shape[2] == 4 else None
    return Photograph(colour, alpha, gray, profile)


def _png_8(pixels: np.ndarray, profile: bytes | None) -> bytes:
    image = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", icc_profile=profile)
    return buffer.getvalue()


def _png_16(pixels: np.ndarray, profile: bytes | None) -> bytes:
    """16 bits a channel. PNG stores big-endian rows, each behind the number of its filter (0: none)."""
    height, width, channels = pixels.shape
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    rows = np.zeros((height, 1 + 2 * width * channels), np.uint8)
    rows[:, 1:] = pixels.astype(">u2").reshape(height, -1).view(np.uint8)
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0))]
    if profile is not None:
        chunks.append((b"iCCP", b"ICC Profile\0\0" + zlib.compress(profile)))
    chunks += [(b"IDAT", zlib.compress(rows.tobytes())), (b"IEND", b"")]
    return PNG_SIGNATURE + b"".join(_chunk(*chunk) for chunk in chunks)


def _chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
