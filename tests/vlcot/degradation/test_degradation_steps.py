"""Every step of the degradation alone."""

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from skimage import data

from vlcot.degradation.steps import (
    RESIZE_MODES,
    add_gaussian_noise,
    add_poisson_noise,
    filter2d,
    jpeg,
    rescale,
    resize,
    to_float,
    to_uint8,
    usm_sharpen,
)

pytestmark = pytest.mark.unit


@pytest.fixture(scope="module")
def photo() -> np.ndarray:
    return to_float(data.astronaut()[100:164, 180:260])


@pytest.mark.parametrize("height, width", [(1, 2), (3, 5), (16, 16), (40, 33)])
def test_filter_reflects_repeatedly_where_the_image_is_smaller_than_the_kernel(height: int, width: int) -> None:
    rng = np.random.default_rng(0)
    image = rng.random((height, width, 3), dtype=np.float32)
    kernel = rng.random((21, 21))
    kernel /= kernel.sum()
    padded = np.pad(image, ((10, 10), (10, 10), (0, 0)), mode="reflect").astype(np.float64)
    windows = np.lib.stride_tricks.sliding_window_view(padded, (21, 21), axis=(0, 1))
    expected = np.einsum("hwcij,ij->hwc", windows, kernel)
    np.testing.assert_allclose(filter2d(image, kernel), expected, atol=1e-6)


def test_filter_keeps_float32_and_passes_through_a_pulse(photo: np.ndarray) -> None:
    pulse = np.zeros((21, 21))
    pulse[10, 10] = 1.0
    filtered = filter2d(photo, pulse)
    assert filtered.dtype == np.float32
    np.testing.assert_allclose(filtered, photo, atol=1e-6)


@pytest.mark.parametrize("mode", RESIZE_MODES)
@pytest.mark.parametrize("factor", [0.15, 0.43, 1.0, 1.5])
def test_rescale_equals_torch_with_the_same_factor(photo: np.ndarray, mode: str, factor: float) -> None:
    batch = torch.from_numpy(photo.transpose(2, 0, 1).copy())[None]
    expected = F.interpolate(batch, scale_factor=factor, mode=mode)[0].numpy().transpose(1, 2, 0)
    scaled = rescale(photo, factor, mode)
    assert scaled.shape == (int(64 * factor), int(80 * factor), 3) and scaled.flags.c_contiguous
    np.testing.assert_allclose(scaled, expected, atol=1e-6)


def test_area_halves_by_averaging() -> None:
    image = np.arange(48, dtype=np.float32).reshape(4, 4, 3) / 48
    expected = image.reshape(2, 2, 2, 2, 3).mean(axis=(1, 3))
    np.testing.assert_allclose(resize(image, 2, 2, "area"), expected, atol=1e-6)


def test_bilinear_and_bicubic_equal_opencv(photo: np.ndarray) -> None:
    for mode, flag in (("bilinear", cv2.INTER_LINEAR), ("bicubic", cv2.INTER_CUBIC)):
        expected = cv2.resize(photo, (61, 23), interpolation=flag)
        np.testing.assert_allclose(resize(photo, 23, 61, mode), expected, atol=2e-5)


@pytest.mark.parametrize("mode", RESIZE_MODES)
def test_rescale_leaves_at_least_one_pixel(mode: str) -> None:
    assert rescale(np.full((4, 8, 3), 0.5, np.float32), 0.15, mode).shape == (1, 1, 3)


def test_unknown_resize_mode_is_named() -> None:
    with pytest.raises(ValueError, match=r"'nearest'.*area"):
        resize(np.zeros((4, 4, 3), np.float32), 2, 2, "nearest")


def test_gaussian_noise_has_the_stated_sigma() -> None:
    gray = np.full((200, 200, 3), 0.5, np.float32)
    noise = (add_gaussian_noise(gray, 20.0, False, np.random.default_rng(0)) - gray) * 255
    assert noise.dtype == np.float32
    assert noise.std() == pytest.approx(20.0, rel=0.01)
    assert abs(noise.mean()) < 0.3
    assert abs(np.corrcoef(noise[..., 0].ravel(), noise[..., 1].ravel())[0, 1]) < 0.03


def test_poisson_noise_has_the_variance_of_the_photon_count() -> None:
    # Two levels, 64 and 192: 2 photons at full brightness, so var = level / 2, times scale^2.
    image = np.full((200, 400, 3), 64 / 255, np.float32)
    image[:, 200:] = 192 / 255
    noise = add_poisson_noise(image, 0.05, False, np.random.default_rng(0)) - image
    for half, level in ((noise[:, :200], 64 / 255), (noise[:, 200:], 192 / 255)):
        assert half.std() == pytest.approx(0.05 * (level / 2) ** 0.5, rel=0.02)
        assert abs(half.mean()) < 5e-4


def test_poisson_photons_are_the_distinct_levels_rounded_up_to_a_power_of_two() -> None:
    # Three levels make 4 photons: every sample is a multiple of 1/4.
    image = to_float(np.repeat(np.array([60, 120, 180], np.uint8), 3000).reshape(90, 100)[..., None])
    image = np.repeat(image, 3, axis=2)
    noisy = add_poisson_noise(image, 1.0, False, np.random.default_rng(0))
    inside = (noisy > 0) & (noisy < 1)
    np.testing.assert_allclose((noisy[inside] * 4) % 1 % 1, 0, atol=1e-5)
    assert {round(float(v) * 4) for v in noisy[inside]} == {1, 2, 3}


@pytest.mark.parametrize("add, level", [(add_gaussian_noise, 5.0), (add_poisson_noise, 0.05)])
def test_gray_noise_is_equal_in_all_channels(add, level: float) -> None:
    image = np.full((32, 32, 3), (0.4, 0.5, 0.6), np.float32)
    noise = add(image, level, True, np.random.default_rng(0)) - image
    assert noise.std() > 1e-3
    np.testing.assert_allclose(noise[..., 0], noise[..., 1], atol=1e-6)
    np.testing.assert_allclose(noise[..., 0], noise[..., 2], atol=1e-6)


def test_gray_poisson_noise_is_that_of_the_luma() -> None:
    # Luma 0.2989 * 204 + 0.587 * 26 + 0.114 * 26 = 79.2; one level makes one photon: 0.05 * (k - 79/255).
    image = to_float(np.full((40, 40, 3), (204, 26, 26), np.uint8))
    noise = add_poisson_noise(image, 0.05, True, np.random.default_rng(0)) - image
    np.testing.assert_allclose(noise.min(), -0.05 * 79 / 255, atol=1e-6)


@pytest.mark.parametrize("add, level", [(add_gaussian_noise, 30.0), (add_poisson_noise, 3.0)])
@pytest.mark.parametrize("gray", [False, True])
def test_noise_is_drawn_by_the_generator_alone_and_clipped(photo, add, level: float, gray: bool) -> None:
    first, again, other = (add(photo, level, gray, np.random.default_rng(s)) for s in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    assert first.dtype == np.float32 and first.min() >= 0.0 and first.max() <= 1.0


def test_jpeg_loses_more_at_lower_quality_and_keeps_channel_order(photo: np.ndarray) -> None:
    errors = [np.abs(jpeg(photo, q) - photo).mean() for q in (95, 60, 30)]
    assert 0 < errors[0] < errors[1] < errors[2]
    red = jpeg(np.full((16, 16, 3), (1.0, 0.0, 0.0), np.float32), 95)
    assert red[..., 0].min() > 0.95 and red[..., 1:].max() < 0.05


def test_jpeg_subsamples_chroma_in_blocks_of_two() -> None:
    # Red and cyan of equal luma in single-pixel columns: 4:2:0 averages the colour away.
    image = np.full((32, 32, 3), 0.5, np.float32)
    image[:, ::2, 0] += 0.2
    image[:, ::2, 1] -= 0.2 * 0.299 / 0.587
    coded = jpeg(image, 95)
    assert np.ptp(coded[..., 0], axis=1).max() < 0.1 < np.ptp(image[..., 0], axis=1).max()


@pytest.mark.parametrize("height, width", [(1, 1), (5, 9), (16, 16)])
def test_jpeg_takes_any_size_and_values_out_of_range(height: int, width: int) -> None:
    coded = jpeg(np.full((height, width, 3), 1.3, np.float32), 95)
    assert coded.shape == (height, width, 3) and coded.dtype == np.float32
    assert coded.min() > 0.98 and coded.max() <= 1.0


def test_usm_leaves_flat_and_faint_detail_and_enhances_edges() -> None:
    flat = np.full((80, 80, 3), 0.4, np.float32)
    np.testing.assert_allclose(usm_sharpen(flat), flat, atol=1e-6)
    faint = flat.copy()
    faint[:, 40:] += 9 / 255
    np.testing.assert_allclose(usm_sharpen(faint), faint, atol=1e-6)
    edge = flat.copy()
    edge[:, 40:] = 0.6
    sharp = usm_sharpen(edge)
    assert sharp.dtype == np.float32
    assert sharp[40, 39, 0] < 0.39 and sharp[40, 40, 0] > 0.61


def test_usm_equals_its_formula_with_an_independent_blur(photo: np.ndarray) -> None:
    axis = np.arange(-25, 26)
    taps = np.exp(-(axis**2) / (2 * 8.0**2))
    taps /= taps.sum()

    def blur(image: np.ndarray) -> np.ndarray:
        padded = np.pad(image.astype(np.float64), ((25, 25), (25, 25), (0, 0)), mode="reflect")
        windows = np.lib.stride_tricks.sliding_window_view(padded, (51, 51), axis=(0, 1))
        return np.einsum("hwcij,i,j->hwc", windows, taps, taps, optimize=True)

    image = photo[:40, :40]
    detail = image - blur(image)
    mask = blur(np.abs(detail) * 255 > 10)
    expected = mask * np.clip(image + 0.5 * detail, 0, 1) + (1 - mask) * image
    np.testing.assert_allclose(usm_sharpen(image), expected, atol=1e-4)


def test_bytes_survive_float() -> None:
    values = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(to_uint8(to_float(values)), values)
