"""The ten metrics of the paper's tables, through pyiqa, called as OSEDiff's ``test_metrics.py`` calls them.

PSNR and SSIM are on the Y channel of YCbCr (ITU-R BT.601, 16..235), no border cropped; without ``color_space``
pyiqa's Y is full-range and PSNR 1.32 dB lower. All but these two need published weights: see ``vlcot.metric_weights``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from vlcot import metric_weights

LUMA = MappingProxyType({"test_y_channel": True, "color_space": "ycbcr"})


@dataclass(frozen=True)
class Metric:
    """One row of the paper's tables.

    ``weights`` are the names of the files that pyiqa 0.1.16 would download; ``decimals`` is how the tables print it.
    """

    name: str
    pyiqa_name: str
    needs_reference: bool
    lower_is_better: bool
    decimals: int
    weights: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @property
    def compares_folders(self) -> bool:
        """True of FID: one value for a folder, none for an image."""
        return self.pyiqa_name == "fid"


METRICS = {
    metric.name: metric
    for metric in (
        Metric("PSNR", "psnr", True, False, 2, options=LUMA),
        Metric("SSIM", "ssim", True, False, 4, options=LUMA),
        Metric("LPIPS", "lpips", True, True, 4, ("alexnet-owt-7be5be79.pth", "LPIPS_v0.1_alex-df73285e.pth")),
        Metric("DISTS", "dists", True, True, 4, ("vgg16-397923af.pth", "DISTS_weights-f5e65c96.pth")),
        Metric("FID", "fid", True, True, 2, ("pt_inception-2015-12-05-6726825d.pth",)),
        Metric("NIQE", "niqe", False, True, 4, ("niqe_modelparameters.mat",)),
        Metric("MUSIQ", "musiq", False, False, 2, ("musiq_koniq_ckpt-e95806b9.pth",)),
        Metric("MANIQA", "maniqa-pipal", False, False, 4, ("MANIQA_PIPAL-ae6d356b.pth",)),
        Metric("CLIPIQA", "clipiqa", False, False, 4, ("RN50.pt",)),
        # The paper does not say which TOPIQ; the authors' reward is this one, trained on KonIQ.
        Metric("TOPIQ", "topiq_nr", False, False, 4, ("cfanet_nr_koniq_res50-9a73138b.pth",)),
    )
}


def load_metric(metric: Metric, files: Mapping[str, Path]) -> torch.nn.Module:
    """The pyiqa model of ``metric`` on the CPU; never downloads.

    Args:
        files: where each of ``metric.weights`` is.

    Raises:
        ValueError: a weight file cannot be read or does not fit.
    """
    return metric_weights.load(metric.pyiqa_name, {name: files[name] for name in metric.weights}, metric.options)


def missing_weights(names: Iterable[str], files: Mapping[str, Path]) -> dict[str, tuple[str, ...]]:
    """Metric name -> its weight files that are not among ``files``; a metric that lacks none is left out."""
    lacking = {name: tuple(file for file in METRICS[name].weights if file not in files) for name in names}
    return {name: absent for name, absent in lacking.items() if absent}


def score_image(metric: Metric, model: torch.nn.Module, image: np.ndarray, reference: np.ndarray | None) -> float:
    """``metric`` of one uint8 [H, W, 3] RGB image; ``reference`` may be None if the metric needs none.

    Raises:
        ValueError: shapes or dtypes differ.
    """
    return score_images(metric, model, [image], [reference])[0]


def score_images(
    metric: Metric, model: torch.nn.Module, images: Sequence[np.ndarray], references: Sequence[np.ndarray | None]
) -> list[float]:
    """``metric`` of each of several uint8 RGB images of one shape [H, W, 3], in one call of the model, on its device.

    PSNR of two equal images is 80 dB: pyiqa adds 1e-8 to the mean squared error.

    Args:
        references: one per image; not read if the metric needs none.

    Raises:
        ValueError: shapes or dtypes differ.
    """
    batches = [images]
    if metric.needs_reference:
        batches.append([_comparable(metric, i, reference) for i, reference in zip(images, references, strict=True)])
    tensors = [torch.from_numpy(np.stack(batch)).permute(0, 3, 1, 2).float() / 255 for batch in batches]
    values: list[float] = model(*tensors).reshape(-1).tolist()
    return values


def _comparable(metric: Metric, image: np.ndarray, reference: np.ndarray | None) -> np.ndarray:
    if reference is None or image.shape != reference.shape or {image.dtype, reference.dtype} != {np.dtype("uint8")}:
        other = "no reference" if reference is None else f"{reference.shape} {reference.dtype}"
        raise ValueError(
            f"{metric.name} needs two uint8 images of one shape, got {image.shape} {image.dtype} and {other}"
        )
    return reference


def score_folders(model: torch.nn.Module, results: Path, references: Path) -> float:
    """FID (clean mode) between the images under two folders."""
    return float(model(str(references), str(results), num_workers=0, verbose=False))


def psnr(image: np.ndarray, reference: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of two uint8 [H, W, 3] RGB images.

    Raises:
        ValueError: shapes or dtypes differ.
    """
    return score_image(METRICS["PSNR"], _weightless("PSNR"), image, reference)


def ssim(image: np.ndarray, reference: np.ndarray) -> float:
    """Structural similarity (11x11 window, sigma 1.5) of two uint8 [H, W, 3] RGB images.

    Raises:
        ValueError: shapes or dtypes differ.
    """
    return score_image(METRICS["SSIM"], _weightless("SSIM"), image, reference)


@cache
def _weightless(name: str) -> torch.nn.Module:
    return load_metric(METRICS[name], {})
