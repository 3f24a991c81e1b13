"""PSNR and SSIM as the paper computes them, and how pyiqa is called for all ten metrics."""

from __future__ import annotations

from urllib.parse import urlparse

import numpy as np
import pytest
from skimage import data

from tests.vlcot.y_channel import psnr_of_y, ssim_of_y
from vlcot.metrics import METRICS, psnr, ssim

pytestmark = pytest.mark.unit


def _pair() -> tuple[np.ndarray, np.ndarray]:
    image = data.astronaut()[100:228, 150:278]
    noise = np.random.default_rng(0).normal(0, 12, image.shape)
    return np.clip(image + noise, 0, 255).astype(np.uint8), image


def test_psnr_equals_scikit_image_on_the_y_channel():
    noisy, clean = _pair()
    assert psnr(noisy, clean) == pytest.approx(psnr_of_y(noisy, clean), abs=1e-4)


def test_ssim_equals_scikit_image_on_the_y_channel():
    noisy, clean = _pair()
    assert ssim(noisy, clean) == pytest.approx(ssim_of_y(noisy, clean), abs=1e-4)


def test_full_range_luma_would_be_1_32_db_lower():
    """The usual failure to reproduce these tables: pyiqa's default Y."""
    import pyiqa
    import torch

    batches = [torch.from_numpy(i.copy()).permute(2, 0, 1)[None] / 255 for i in _pair()]
    full_range = pyiqa.create_metric("psnr", test_y_channel=True, device="cpu")(*batches)
    assert psnr(*_pair()) - float(full_range) == pytest.approx(20 * np.log10(255 / 219), abs=1e-3)


def test_images_of_different_shape_are_refused():
    noisy, clean = _pair()
    with pytest.raises(ValueError, match="one shape"):
        psnr(noisy[:64], clean)


def test_the_calls_are_those_of_osediff():
    luma = {"test_y_channel": True, "color_space": "ycbcr"}
    assert {name: (m.pyiqa_name, dict(m.options)) for name, m in METRICS.items()} == {
        "PSNR": ("psnr", luma),
        "SSIM": ("ssim", luma),
        "LPIPS": ("lpips", {}),
        "DISTS": ("dists", {}),
        "FID": ("fid", {}),
        "NIQE": ("niqe", {}),
        "MUSIQ": ("musiq", {}),
        "MANIQA": ("maniqa-pipal", {}),
        "CLIPIQA": ("clipiqa", {}),
        "TOPIQ": ("topiq_nr", {}),
    }


def test_directions_and_references_are_those_of_pyiqa():
    from pyiqa.default_model_configs import DEFAULT_CONFIGS

    for metric in METRICS.values():
        theirs = DEFAULT_CONFIGS[metric.pyiqa_name]
        assert metric.lower_is_better == theirs.get("lower_better", False), metric.name
        if not metric.compares_folders:
            assert metric.needs_reference == (theirs["metric_mode"] == "FR"), metric.name


def test_weight_files_have_the_names_that_pyiqa_asks_for():
    from pyiqa.archs import (
        clip_model,
        dists_arch,
        inception,
        lpips_arch,
        maniqa_arch,
        musiq_arch,
        niqe_arch,
        topiq_arch,
    )
    from pyiqa.default_model_configs import DEFAULT_CONFIGS
    from torchvision import models

    options = {name: DEFAULT_CONFIGS[metric.pyiqa_name]["metric_opts"] for name, metric in METRICS.items()}
    lpips = "{version}_{net}".format(**options["LPIPS"])
    urls = {
        "LPIPS": (models.AlexNet_Weights.IMAGENET1K_V1.url, lpips_arch.default_model_urls[lpips]),
        "DISTS": (models.VGG16_Weights.IMAGENET1K_V1.url, dists_arch.default_model_urls["url"]),
        "FID": (inception.FID_WEIGHTS_URL,),
        "NIQE": (niqe_arch.default_model_urls["url"],),
        "MUSIQ": (musiq_arch.default_model_urls[options["MUSIQ"]["pretrained"]],),
        "MANIQA": (maniqa_arch.default_model_urls[options["MANIQA"]["train_dataset"]],),
        "CLIPIQA": (clip_model._MODELS["RN50"],),
        "TOPIQ": (topiq_arch.default_model_urls[options["TOPIQ"]["model_name"]],),
    }
    asked = {name: tuple(urlparse(url).path.rsplit("/", 1)[1] for url in of) for name, of in urls.items()}
    assert {name: metric.weights for name, metric in METRICS.items() if metric.weights} == asked
