"""Files of the shapes that the published ones have, with random values: enough to hold how metrics are called."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import scipy.io
import torch
from torchvision import models

from vlcot.metrics import METRICS

LPIPS_CHANNELS = (64, 192, 384, 256, 256)
DISTS_CHANNELS = 3 + 64 + 128 + 256 + 512 + 512


def write_metric_weights(name: str, folder: Path) -> dict[str, Path]:
    """Weight file name -> path, of a metric that is a key of ``WRITERS``."""
    torch.manual_seed(0)
    files = {file: folder / file for file in METRICS[name].weights}
    WRITERS[name](*files.values())
    return files


def _torchvision(build: Callable[[], torch.nn.Module], path: Path) -> None:
    """The convolutions; the classifier is not used: one stored value stretched to its shape keeps the file small."""
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in build().state_dict().items()}
    state = {
        name: torch.zeros(1).expand(shape) if name.startswith("classifier") else torch.randn(shape) / 20
        for name, shape in shapes.items()
    }
    torch.save(state, path)


def _lpips(backbone: Path, head: Path) -> None:
    _torchvision(models.alexnet, backbone)
    torch.save({f"lin{i}.model.1.weight": torch.rand(1, c, 1, 1) for i, c in enumerate(LPIPS_CHANNELS)}, head)


def _dists(backbone: Path, head: Path) -> None:
    _torchvision(models.vgg16, backbone)
    torch.save({name: torch.rand(1, DISTS_CHANNELS, 1, 1) for name in ("alpha", "beta")}, head)


def _niqe(path: Path) -> None:
    mean = np.random.default_rng(0).normal(1, 0.2, (1, 36))
    scipy.io.savemat(path, {"mu_prisparam": mean, "cov_prisparam": np.eye(36)})


def _musiq(path: Path) -> None:
    from pyiqa.archs.musiq_arch import MUSIQ

    torch.save(MUSIQ(pretrained=False, num_class=1).state_dict(), path)


def _clipiqa(path: Path) -> None:
    """A narrow CLIP, whose sizes are read from the file: a TorchScript archive, as the published one."""
    from pyiqa.archs.clip_model import CLIP

    model = CLIP(64, 224, (1, 1, 1, 1), 8, None, 77, 49408, 64, 1, 1).eval()
    inputs = torch.zeros(1, 3, 224, 224), torch.zeros(1, 77, dtype=torch.long)
    torch.jit.save(torch.jit.trace(model, inputs, check_trace=False), path)


def _topiq(path: Path) -> None:
    from pyiqa.archs.topiq_arch import CFANet

    torch.save({"params": CFANet(backbone_pretrain=False, pretrained=False, use_ref=False).state_dict()}, path)


WRITERS: Mapping[str, Callable[..., None]] = {
    "LPIPS": _lpips,
    "DISTS": _dists,
    "NIQE": _niqe,
    "MUSIQ": _musiq,
    "CLIPIQA": _clipiqa,
    "TOPIQ": _topiq,
}
