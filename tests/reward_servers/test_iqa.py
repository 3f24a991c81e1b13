"""The metrics server measures as ``vlcot.metrics`` does, one image or many, and says why where it cannot."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from skimage import data

from reward_servers.contract import Measurement, RewardServerError
from reward_servers.iqa import Iqa, IqaConfig
from tests.vlcot.random_metric_weights import WRITERS, write_metric_weights
from vlcot.metrics import METRICS, load_metric, psnr, score_image, ssim

OFFLINE = ("PSNR", "SSIM")


def noisy(clean: np.ndarray, count: int, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [np.clip(clean + rng.normal(0, 8 * (i + 1), clean.shape), 0, 255).astype(np.uint8) for i in range(count)]


@pytest.fixture(scope="module")
def clean() -> np.ndarray:
    return np.ascontiguousarray(data.astronaut()[100:164, 150:214])


@pytest.fixture(scope="module")
def iqa() -> Iqa:
    return Iqa(IqaConfig(OFFLINE, batch_size=3))


@pytest.mark.engine
def test_values_equal_those_of_the_evaluation_whatever_comes_together(iqa, clean):
    small = np.ascontiguousarray(clean[:48, :40])
    requests = [(noisy(clean, 4), clean), (noisy(small, 2), small), (noisy(clean, 1, seed=1), clean)]
    for (images, truth), found in zip(requests, iqa.measure(requests), strict=True):
        assert found.values["PSNR"] == pytest.approx([psnr(image, truth) for image in images], abs=1e-5)
        assert found.values["SSIM"] == pytest.approx([ssim(image, truth) for image in images], abs=1e-6)
    assert len({value for images in iqa.measure(requests) for value in images.values["PSNR"]}) == 7


@pytest.mark.engine
def test_equal_images_have_a_finite_psnr(iqa, clean):
    (found,) = iqa.measure([([clean], clean)])
    assert found.values["PSNR"] == pytest.approx((80.0,), abs=0.01) and found.values["SSIM"] == pytest.approx((1.0,))


@pytest.mark.engine
@pytest.mark.parametrize("name", WRITERS)
def test_metrics_with_weights_are_found_in_the_folder_and_measure_as_the_evaluation_does(name, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "no-hub"))
    images, truth = noisy(data.astronaut()[64:320, 64:320], 2), data.astronaut()[64:320, 64:320]
    files = write_metric_weights(name, tmp_path)
    server = Iqa(IqaConfig((name,), str(tmp_path)))
    model, reference = load_metric(METRICS[name], files), truth if METRICS[name].needs_reference else None
    expected = [score_image(METRICS[name], model, image, reference) for image in images]
    assert server.measure([(images, reference)]) == [Measurement({name: tuple(expected)})]
    assert expected[0] != expected[1]


@pytest.mark.engine
def test_a_request_that_cannot_be_measured_leaves_the_others_their_answers(iqa, clean):
    """SSIM needs 11 pixels on a side; no number stands in for it."""
    tiny = np.ascontiguousarray(clean[:8, :8])
    bad, good = iqa.measure_each([([tiny], tiny), (noisy(clean, 1), clean)])
    assert isinstance(bad, RewardServerError) and "SSIM of image 0" in str(bad)
    assert isinstance(good, Measurement)
    with pytest.raises(RewardServerError, match="SSIM of image 0"):
        iqa.measure([([tiny], tiny)])


@pytest.mark.engine
def test_requests_that_make_no_sense_are_refused(iqa, clean):
    for images, reference, said in (
        ([], clean, "at least one image"),
        ([clean], None, "PSNR, SSIM compare with a reference image, and none was sent"),
        ([clean], clean[:32], "the reference image must have the size of the others"),
        ([clean, clean[:32]], clean, "must have one size"),
        ([clean.astype(np.float32)], clean, "uint8"),
    ):
        with pytest.raises(ValueError, match=said):
            iqa.measure([(images, reference)])
    with pytest.raises(ValueError, match=r"iqa\.metrics is no live setting"):
        iqa.reconfigure({"metrics": ["PSNR"]})


@pytest.mark.unit
@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"metrics": ()}, "at least one metric"),
        ({"metrics": ("PSNR", "PSNR")}, "none twice"),
        ({"metrics": ("FID",)}, "no FID; there are PSNR, SSIM"),
        ({"metrics": OFFLINE, "batch_size": 0}, r"iqa\.batch_size must be a whole number of at least 1, got 0"),
    ],
)
def test_a_bad_configuration_is_refused_by_name(settings, said):
    with pytest.raises(ValueError, match=said):
        IqaConfig(**settings)


@pytest.mark.unit
def test_a_metric_without_its_weights_is_refused_and_nothing_is_downloaded(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "no-hub"))
    with pytest.raises(ValueError, match=r"LPIPS needs alexnet\S+, LPIPS\S+; MUSIQ needs musiq\S+: not found under"):
        Iqa(IqaConfig(("PSNR", "LPIPS", "MUSIQ"), str(tmp_path)))
    with pytest.raises(ValueError, match=r"iqa\.weights_dir=/none: no such folder"):
        Iqa(IqaConfig(("LPIPS",), "/none"))
