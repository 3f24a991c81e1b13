"""Training images per second and core at 512 pixels, against the reference's structure: `python -m
benchmarks.degradation`.

Ours is ``vlcot.degradation`` (make_target, degrade) on uint8 crops, one process, one thread: what every worker of
`prepare-data` does on its own core. The other side is a plain version of the structure that SeeSR's
``utils_data/make_paired_data.py`` and its kind have: the training loop makes one image at a time in torch, float32 NCHW
from start to end, kernels applied by ``F.conv2d``, USM by two convolutions of 51x51, noise by torch, JPEG as tensor
operations (block DCT, 4:2:0). It is our own code of that structure, not theirs, and theirs runs on a GPU: the ratio is
one of CPU cores. Both sides degrade the same crops by the same records. One thread each, in turn, CPU seconds. USM is
measured with and without, for its wide dense convolutions are most of the plain side's time.

The plan divides 94,991 images (LSDIR 84,991 and 10,000 of FFHQ) by the measured rate. It covers target and degradation;
VQ codes and captions are not in it, nor is the reading of the files.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.figures import machine, output_option, write
from toy.photographs import load_photographs
from vlcot.degradation import SEESR_TRAINING, DegradationConfig, DegradationRecord, degrade, make_target, sample_record
from vlcot.degradation.record import GAUSSIAN, Noise, Stage

SIDE = 512
IMAGES = 84_991 + 10_000
_LUMA = [[16, 11, 10, 16, 24, 40, 51, 61], [12, 12, 14, 19, 26, 58, 60, 55], [14, 13, 16, 24, 40, 57, 69, 56],
         [14, 17, 22, 29, 51, 87, 80, 62], [18, 22, 37, 56, 68, 109, 103, 77], [24, 35, 55, 64, 81, 104, 113, 92],
         [49, 64, 78, 87, 103, 121, 120, 101], [72, 92, 95, 98, 112, 100, 103, 99]]  # fmt: skip
"""JPEG's example tables (ITU-T T.81, annex K)."""
_CHROMA = [[17, 18, 24, 47], [18, 21, 26, 66], [24, 26, 56, 99], [47, 66, 99, 99]]
_TO_YCC = [[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]]


class PlainStructure:
    """One image at a time, as torch tensors."""

    def __init__(self, sharpen: bool) -> None:
        self.sharpen = sharpen
        k = torch.arange(8.0)
        self.dct = torch.cos((2 * k[None] + 1) * k[:, None] * math.pi / 16) / 2
        self.dct[0] /= math.sqrt(2)
        chroma = torch.full((8, 8), 99.0)
        chroma[:4, :4] = torch.tensor(_CHROMA, dtype=torch.float32)
        self.tables = torch.tensor(_LUMA, dtype=torch.float32), chroma
        self.to_ycc = torch.tensor(_TO_YCC)
        wide = cv2.getGaussianKernel(51, 0)
        self.wide = torch.from_numpy(wide @ wide.T).float()

    def __call__(self, crop: np.ndarray, record: DegradationRecord) -> torch.Tensor:
        """LR image float32 [1, 3, 128, 128] of a uint8 crop."""
        image = torch.from_numpy(crop).permute(2, 0, 1)[None].float() / 255
        image = self._sharpened(image) if self.sharpen else image
        lr = [record.height // 4, record.width // 4]
        image = self._stage(image, record.stage1, [int(n * record.stage1.resize.factor) for n in image.shape[2:]])
        image = self._jpeg(image.clamp(0, 1), record.stage1.jpeg_quality)
        image = self._stage(image, record.stage2, [int(n * record.stage2.resize.factor) for n in lr])
        sinc = torch.zeros(21, 21)
        sinc[10, 10] = 1.0
        if record.final_sinc is not None:
            sinc = torch.from_numpy(record.final_sinc.render()).float()
        if record.jpeg_last:
            image = self._filtered(F.interpolate(image, lr, mode=record.final_mode), sinc)
            return self._jpeg(image.clamp(0, 1), record.stage2.jpeg_quality).clamp(0, 1)
        image = self._jpeg(image.clamp(0, 1), record.stage2.jpeg_quality)
        return self._filtered(F.interpolate(image, lr, mode=record.final_mode), sinc).clamp(0, 1)

    def _stage(self, image: torch.Tensor, stage: Stage, size: Sequence[int]) -> torch.Tensor:
        if stage.blur is not None:
            image = self._filtered(image, torch.from_numpy(stage.blur.render()).float())
        image = F.interpolate(image, [max(1, n) for n in size], mode=stage.resize.mode)
        return self._noisy(image, stage.noise)

    def _filtered(self, image: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
        half = kernel.shape[0] // 2
        padded = F.pad(image, [half] * 4, mode="reflect" if min(image.shape[2:]) > half else "replicate")
        return F.conv2d(padded.transpose(0, 1), kernel[None, None]).transpose(0, 1)

    def _sharpened(self, image: torch.Tensor) -> torch.Tensor:
        detail = image - self._filtered(image, self.wide)
        mask = self._filtered((detail.abs() * 255 > 10).float(), self.wide)
        return mask * (image + 0.5 * detail).clamp(0, 1) + (1 - mask) * image

    def _noisy(self, image: torch.Tensor, noise: Noise) -> torch.Tensor:
        base = (image.clamp(0, 1) * 255).round() / 255
        if noise.gray:
            base = (base * torch.tensor([0.2989, 0.587, 0.114])[None, :, None, None]).sum(1, keepdim=True)
        if noise.kind == GAUSSIAN:
            return (image + torch.randn_like(base) * noise.level / 255).clamp(0, 1)
        photons = 2 ** math.ceil(math.log2(len(torch.unique(base))))
        return (image + (torch.poisson(base * photons) / photons - base) * noise.level).clamp(0, 1)

    def _jpeg(self, image: torch.Tensor, quality: int) -> torch.Tensor:
        height, width = image.shape[2:]
        image = F.pad(image, [0, -width % 16, 0, -height % 16], mode="replicate")
        ycc = torch.einsum("ij,bjhw->bihw", self.to_ycc, image * 255)
        factor = (5000 / quality if quality < 50 else 200 - 2 * quality) / 100
        luma = self._rounded(ycc[:, :1] - 128, self.tables[0] * factor) + 128
        chroma = self._rounded(F.avg_pool2d(ycc[:, 1:], 2), self.tables[1] * factor)
        ycc = torch.cat([luma, F.interpolate(chroma, scale_factor=2, mode="nearest")], 1)
        rgb = torch.einsum("ij,bjhw->bihw", torch.linalg.inv(self.to_ycc), ycc)
        return rgb[:, :, :height, :width].clamp(0, 255) / 255

    def _rounded(self, planes: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        batch, channels, height, width = planes.shape
        blocks = planes.view(batch, channels, height // 8, 8, width // 8, 8).transpose(3, 4)
        table = table.clamp(min=1e-3)
        coefficients = (self.dct @ blocks @ self.dct.T / table).round() * table
        return (self.dct.T @ coefficients @ self.dct).transpose(3, 4).reshape(planes.shape)


def crops(count: int) -> list[np.ndarray]:
    """Crops of 512 pixels of the toy's photographs, padded by reflection where they are smaller."""
    rng, found = np.random.default_rng(0), []
    photographs = list(load_photographs().values())
    for index in range(count):
        pixels = photographs[index % len(photographs)].pixels
        missing = [max(0, SIDE - n) for n in pixels.shape[:2]]
        pixels = np.pad(pixels, [(0, missing[0]), (0, missing[1]), (0, 0)], mode="reflect")
        top, left = (int(rng.integers(0, n - SIDE + 1)) for n in pixels.shape[:2])
        found.append(np.ascontiguousarray(pixels[top : top + SIDE, left : left + SIDE]))
    return found


def _seconds(work: Callable[[np.ndarray, int], Any], images: Sequence[np.ndarray]) -> float:
    """CPU seconds: other programs on the machine take wall time from both sides."""
    started = time.process_time()
    for seed, image in enumerate(images):
        work(image, seed)
    return time.process_time() - started


def run(count: int, rounds: int) -> dict[str, Any]:
    """All figures."""
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    images = crops(count)
    sharpened = _compared(images, rounds, SEESR_TRAINING)
    rate = sharpened["ours_images_per_s_core"]
    return {
        "machine": machine(),
        "side": SIDE,
        "images": count,
        "rounds": rounds,
        "with_usm": sharpened,
        "without_usm": _compared(images, rounds, replace(SEESR_TRAINING, sharpen_target=False)),
        "plan_images": IMAGES,
        "plan_minutes": {str(cores): round(IMAGES / rate / cores / 60, 1) for cores in (16, 256)},
        "plan_is": "arithmetic: images / (rate x cores); target and degradation only, not measured on so many cores",
    }


def _compared(images: Sequence[np.ndarray], rounds: int, config: DegradationConfig) -> dict[str, float]:
    plain = PlainStructure(config.sharpen_target)

    def ours(image: np.ndarray, seed: int) -> np.ndarray:
        return degrade(make_target(image, config), config, seed)[0]

    def theirs(image: np.ndarray, seed: int) -> torch.Tensor:
        with torch.no_grad():
            return plain(image, sample_record(config, np.random.default_rng(seed), SIDE, SIDE))

    pairs = [(_seconds(theirs, images), _seconds(ours, images)) for _ in range(rounds)]
    pixels = (theirs(image, i)[0].permute(1, 2, 0).numpy() * 255 - ours(image, i) for i, image in enumerate(images[:8]))
    return {
        "plain_structure_images_per_s_core": round(len(images) / statistics.median(a for a, _ in pairs), 2),
        "ours_images_per_s_core": round(len(images) / statistics.median(b for _, b in pairs), 2),
        "ratio": round(statistics.median(a / b for a, b in pairs), 2),
        "bias_between_the_sides_levels": round(float(np.mean([p.mean() for p in pixels])), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    output_option(parser, "degradation")
    args = parser.parse_args()
    write(args.output, run(args.images, args.rounds))


if __name__ == "__main__":
    main()
