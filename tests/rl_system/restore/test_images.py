"""Every kind of file is read as it looks, and written with what it had."""

from __future__ import annotations

import io

import cv2
import numpy as np
import pytest
from PIL import Image, ImageCms

from rl_system.studies.restore import images
from rl_system.studies.restore.images import ImageRefused, Photograph
from vlcot.images import upscale_for_policy

pytestmark = pytest.mark.unit
RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (6, 9, 3), dtype=np.uint8)
DEEP = RNG.integers(0, 65536, (6, 9, 4), dtype=np.uint16)
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def read(tmp_path, image: Image.Image, suffix: str = ".png", **options) -> Photograph:
    path = tmp_path / f"picture{suffix}"
    image.save(path, **options)
    photograph = images.read_photograph(path)
    assert images.read_size(path) == photograph.size
    return photograph


def read_deep(tmp_path, pixels: np.ndarray, suffix: str = ".png") -> Photograph:
    path = tmp_path / f"deep{suffix}"
    path.write_bytes(cv2.imencode(suffix, pixels)[1].tobytes())
    return images.read_photograph(path)


def round_trip(tmp_path, photograph: Photograph) -> Photograph:
    images.write_photograph(tmp_path / "written.png", photograph)
    return images.read_photograph(tmp_path / "written.png")


def assert_same(left: Photograph, right: Photograph) -> None:
    np.testing.assert_array_equal(left.colour, right.colour)
    assert left.colour.dtype == right.colour.dtype and (left.alpha is None) == (right.alpha is None)
    if left.alpha is not None:
        np.testing.assert_array_equal(left.alpha, right.alpha)
    assert (left.gray, left.profile) == (right.gray, right.profile)


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("gray", [False, True])
@pytest.mark.parametrize("alpha", [False, True])
@pytest.mark.parametrize("profile", [None, SRGB])
def test_what_is_written_is_read_back(tmp_path, bits, gray, alpha, profile):
    pixels = DEEP if bits == 16 else RNG.integers(0, 256, DEEP.shape, dtype=np.uint8)
    colour = np.repeat(pixels[..., :1], 3, axis=-1) if gray else pixels[..., :3]
    photograph = Photograph(colour, pixels[..., 3] if alpha else None, gray, profile)
    found = round_trip(tmp_path, photograph)
    if bits == 16 and gray and alpha:  # OpenCV gives gray with alpha as colour
        photograph = Photograph(colour, pixels[..., 3], False, profile)
    assert_same(found, photograph)
    with Image.open(tmp_path / "written.png") as opened:  # the second reader is Pillow: sizes, chunks, checksums
        opened.load()
        assert opened.size == (9, 6) and opened.info.get("icc_profile") == profile


def test_rgb_rgba_gray_and_gray_with_alpha(tmp_path):
    assert_same(read(tmp_path, Image.fromarray(RGB)), Photograph(RGB))
    rgba = np.dstack([RGB, RGB[..., 0]])
    assert_same(read(tmp_path, Image.fromarray(rgba)), Photograph(RGB, RGB[..., 0]))
    gray = np.repeat(RGB[..., :1], 3, axis=-1)
    assert_same(read(tmp_path, Image.fromarray(RGB[..., 0])), Photograph(gray, gray=True))
    la = Image.merge("LA", [Image.fromarray(RGB[..., 0]), Image.fromarray(RGB[..., 1])])
    assert_same(read(tmp_path, la), Photograph(gray, RGB[..., 1], gray=True))
    bilevel = read(tmp_path, Image.fromarray(RGB[..., 0]).convert("1"))
    assert bilevel.gray and set(np.unique(bilevel.colour)) == {0, 255}


def test_palettes_with_and_without_transparency(tmp_path):
    flat = np.where(RGB[..., :1] > 100, np.uint8([200, 30, 60]), np.uint8([10, 220, 90]))
    palette = Image.fromarray(flat).quantize(4)
    assert_same(read(tmp_path, palette), Photograph(np.asarray(palette.convert("RGB"))))
    clear = read(tmp_path, palette, transparency=0)
    assert clear.alpha is not None and (clear.alpha == 0).any() and (clear.alpha == 255).any()


def test_transparent_colour_of_an_rgb_png(tmp_path):
    photograph = read(tmp_path, Image.fromarray(RGB), transparency=tuple(RGB[2, 3].tolist()))
    assert photograph.alpha is not None and photograph.alpha[2, 3] == 0 and photograph.alpha[0, 0] == 255


def test_sixteen_bits_in_colour_gray_and_with_alpha(tmp_path):
    bgr = DEEP[..., 2::-1]
    assert_same(read_deep(tmp_path, bgr), Photograph(DEEP[..., :3]))
    assert_same(read_deep(tmp_path, bgr, ".tiff"), Photograph(DEEP[..., :3]))
    assert_same(read_deep(tmp_path, np.dstack([bgr, DEEP[..., 3]])), Photograph(DEEP[..., :3], DEEP[..., 3]))
    gray = np.repeat(DEEP[..., :1], 3, axis=-1)
    assert_same(read_deep(tmp_path, DEEP[..., 0]), Photograph(gray, gray=True))


def test_cmyk_becomes_srgb_and_that_is_said(tmp_path):
    cmyk = Image.fromarray(RGB).convert("CMYK")
    photograph = read(tmp_path, cmyk, ".jpg", quality=100)
    assert photograph.colour.shape == (6, 9, 3) and not photograph.gray
    assert photograph.notes == ("CMYK was converted to sRGB; it had no profile",)
    broken = read(tmp_path, cmyk, ".jpg", icc_profile=SRGB)  # of another colour space than the pixels
    assert broken.profile is None and broken.notes == ("CMYK was converted to sRGB; its profile could not be used",)


def test_progressive_jpeg_webp_and_profiles(tmp_path):
    big = Image.fromarray(RGB).resize((90, 60))
    for suffix, options in ((".jpg", {"progressive": True, "quality": 95}), (".webp", {"lossless": True})):
        photograph = read(tmp_path, big, suffix, icc_profile=SRGB, **options)
        assert photograph.profile == SRGB and photograph.size == (60, 90)
        assert np.abs(photograph.colour.astype(int) - np.asarray(big)).mean() < 12


@pytest.mark.parametrize("stored", range(1, 9))
@pytest.mark.parametrize(
    ("suffix", "deep"), [(".png", False), (".png", True), (".jpg", False), (".tiff", False), (".tiff", True)]
)
def test_pictures_are_turned_upright(tmp_path, stored, suffix, deep):
    """Against Pillow's own reading of an 8-bit PNG, whatever the format and the depth."""
    exif = Image.Exif()
    exif[274] = stored
    blocks = np.kron(np.arange(6, dtype=np.uint8).reshape(2, 3) * 40, np.ones((16, 16), np.uint8))
    plain = read(tmp_path, Image.fromarray(blocks), ".png", exif=exif)
    image = Image.fromarray(blocks.astype(np.uint16) * 257 if deep else blocks)
    options = {"tiffinfo": {274: stored}} if suffix == ".tiff" else {"exif": exif}
    photograph = read(tmp_path, image, suffix, **options)
    assert photograph.bits == (16 if deep else 8)
    assert plain.size == ((48, 32) if stored > 4 else (32, 48))
    shown = photograph.colour / (257 if deep else 1)
    np.testing.assert_allclose(shown, plain.colour, atol=6 if suffix == ".jpg" else 0)


def test_only_the_first_frame_of_an_animation_and_that_is_said(tmp_path):
    frames = [Image.fromarray(np.full((6, 9, 3), value, np.uint8)) for value in (10, 200, 90)]
    for suffix in (".gif", ".webp", ".png"):
        photograph = read(tmp_path, frames[0], suffix, save_all=True, append_images=frames[1:])
        assert photograph.notes == ("only the first of 3 frames is restored",)
        assert np.abs(photograph.colour.astype(int) - 10).max() <= 3


def test_broken_files_are_refused_with_the_reason(tmp_path):
    buffer, noise = io.BytesIO(), RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, "PNG")
    cases = {
        "cut.png": (buffer.getvalue()[:-3000], "cannot be decoded: .*truncated"),
        "text.png": (b"no picture at all", "is not an image"),
        "empty.png": (b"", "the file is empty"),
        "cut16.png": (
            cv2.imencode(".png", noise.astype(np.uint16) * 257)[1].tobytes()[:-3000],
            "cannot be decoded: .*truncated",
        ),
    }
    for name, (data, message) in cases.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ImageRefused, match=message):
            images.read_photograph(tmp_path / name)
    (tmp_path / "folder.png").mkdir()
    for name in ("folder.png", "missing.png"):
        with pytest.raises(ImageRefused, match="cannot be read"):
            images.read_photograph(tmp_path / name)
    Image.fromarray(np.ones((4, 4), np.float32)).save(tmp_path / "float.tiff")
    with pytest.raises(ImageRefused, match="pixels of kind F"):
        images.read_photograph(tmp_path / "float.tiff")


def test_the_policy_is_shown_what_training_showed_it():
    lr = RNG.integers(0, 256, (16, 16, 3), dtype=np.uint8)
    shown = images.to_bits(images.enlarged(lr, 64, 64), 8)
    np.testing.assert_array_equal(shown, upscale_for_policy(lr, 64))
    mild = 64 + lr // 2  # else 8 bits are cut off between the axes, where bicubic overshoots
    deep = images.to_bits(images.enlarged(mild.astype(np.uint16) * 257, 64, 64), 8)
    assert np.abs(deep.astype(int) - upscale_for_policy(mild, 64)).max() <= 1


def test_a_result_is_like_its_input():
    colour = RNG.random((24, 36, 3)).astype(np.float32)
    deep = images.like(Photograph(DEEP[..., :3], DEEP[..., 3], profile=SRGB), colour)
    assert deep.colour.dtype == deep.alpha.dtype == np.uint16 and deep.profile == SRGB
    assert deep.size == deep.alpha.shape == (24, 36)
    np.testing.assert_allclose(deep.colour / 65535, colour, atol=1e-5)
    gray = images.like(Photograph(RGB, gray=True), colour).colour
    expected = np.asarray(Image.fromarray(images.to_bits(colour, 8)).convert("L"))
    assert (gray == gray[..., :1]).all() and np.abs(gray[..., 0].astype(int) - expected).max() <= 1
