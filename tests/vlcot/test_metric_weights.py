"""Metrics from local weight files: small random ones here, of the right shapes."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.io
import torch
from skimage import data
from torch.nn import functional as F

from tests.vlcot.random_metric_weights import write_metric_weights
from vlcot.metric_weights import find
from vlcot.metrics import METRICS, load_metric, score_image

pytestmark = pytest.mark.unit
CONVOLUTIONS = ((0, 4, 2), (3, 1, 2), (6, 1, 1), (8, 1, 1), (10, 1, 1))  # layer of AlexNet, stride, padding


@pytest.fixture
def offline(monkeypatch):
    """A download is a failed test."""

    def refuse(*args, **more):
        raise AssertionError(f"download of {args}")

    for target in (
        "torch.hub.download_url_to_file",
        "urllib.request.urlopen",
        "pyiqa.utils.download_util.requests.get",
    ):
        monkeypatch.setattr(target, refuse)


@pytest.fixture(scope="module")
def photographs():
    photo = data.astronaut()
    return photo[100:196, 150:342].copy(), photo[104:200, 150:342].copy()


@pytest.fixture(scope="module")
def lpips_files(tmp_path_factory):
    return write_metric_weights("LPIPS", tmp_path_factory.mktemp("lpips"))


def _lpips(files, *images: np.ndarray) -> float:
    """Zhang et al. 2018, eq. 1, with AlexNet's five ReLU layers."""
    alexnet, heads = (torch.load(path, weights_only=True) for path in files.values())
    shift = torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1)
    scale = torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1)
    x = torch.stack([torch.from_numpy(i).permute(2, 0, 1) for i in images]).float() / 127.5 - 1
    x, distance = (x - shift) / scale, 0.0
    for number, (layer, stride, padding) in enumerate(CONVOLUTIONS):
        x = F.max_pool2d(x, 3, 2) if number in (1, 2) else x
        weight, bias = (alexnet[f"features.{layer}.{kind}"] for kind in ("weight", "bias"))
        x = F.relu(F.conv2d(x, weight, bias, stride, padding))
        first, second = x / x.norm(dim=1, keepdim=True).clamp(min=1e-10)
        distance += float((heads[f"lin{number}.model.1.weight"][0] * (first - second) ** 2).sum(0).mean())
    return distance


def test_lpips_is_its_formula_on_images_in_minus_one_to_one(lpips_files, photographs, offline):
    image, reference = photographs
    model = load_metric(METRICS["LPIPS"], lpips_files)
    value = score_image(METRICS["LPIPS"], model, image, reference)
    assert value > 0.01
    assert value == pytest.approx(_lpips(lpips_files, image, reference), rel=1e-4)
    assert score_image(METRICS["LPIPS"], model, image, image) == 0


def test_a_head_that_lacks_a_layer_is_refused(lpips_files, tmp_path):
    """pyiqa would go on with random values."""
    backbone, head = METRICS["LPIPS"].weights
    state = torch.load(lpips_files[head], weights_only=True)
    del state["lin3.model.1.weight"]
    torch.save(state, tmp_path / head)
    with pytest.raises(ValueError, match=rf"lpips cannot be used .*no lin3.model.1.weight in {head}"):
        load_metric(METRICS["LPIPS"], {backbone: lpips_files[backbone], head: tmp_path / head})


def test_niqe_reads_its_parameters_and_keeps_pyiqas_luma(tmp_path, photographs, offline):
    import pyiqa

    ((_, path),) = (files := write_metric_weights("NIQE", tmp_path)).items()
    value = score_image(METRICS["NIQE"], load_metric(METRICS["NIQE"], files), photographs[0], None)
    theirs = pyiqa.create_metric("niqe", pretrained_model_path=str(path), device="cpu")
    image = torch.from_numpy(photographs[0]).permute(2, 0, 1)[None] / 255
    assert value == pytest.approx(float(theirs(image)), rel=1e-6)


@pytest.mark.parametrize("content", [b"", b"not a weight file", "wrong tensors"])
@pytest.mark.parametrize("name", ["MUSIQ", "NIQE"])
def test_files_that_do_not_fit_are_refused_by_name(tmp_path, offline, name, content):
    path = tmp_path / METRICS[name].weights[0]
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif name == "NIQE":
        scipy.io.savemat(path, {"something": np.eye(2)})
    else:
        torch.save({"something": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=rf"the weights of {METRICS[name].pyiqa_name} cannot be used \({path}\): ."):
        load_metric(METRICS[name], {path.name: path})


def test_weights_are_found_by_name_in_the_folder_before_torchs_own(tmp_path, monkeypatch):
    hub, folder = tmp_path / "hub", tmp_path / "mine"
    for place in (hub / "checkpoints" / "a.pth", hub / "pyiqa" / "b.pth", folder / "deep" / "b.pth", folder / "c.pth"):
        place.parent.mkdir(parents=True, exist_ok=True)
        place.touch()
    monkeypatch.setattr(torch.hub, "_hub_dir", str(hub))
    assert find(["a.pth", "b.pth", "absent.pth"], folder) == {
        "a.pth": hub / "checkpoints" / "a.pth",
        "b.pth": folder / "deep" / "b.pth",
    }
