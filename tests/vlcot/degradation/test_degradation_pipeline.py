"""The pipeline: sizes, determinism, records that make the image again, and what the draws are distributed like."""

import json
from dataclasses import replace
from math import pi

import numpy as np
import pytest
from scipy.stats import binomtest, chisquare, kstest
from skimage import data

from vlcot.degradation import (
    SEESR_LIGHT,
    SEESR_TRAINING,
    DegradationConfig,
    DegradationRecord,
    StageConfig,
    apply_record,
    degrade,
    make_target,
    sample_record,
)
from vlcot.degradation.kernels import GAUSSIAN_KINDS, KERNEL_SIZES, SINC, BlurKernel
from vlcot.degradation.record import Noise, Resize, Stage
from vlcot.degradation.steps import RESIZE_MODES, filter2d, jpeg, resize, to_float, to_uint8

pytestmark = pytest.mark.unit

ALPHA = 1e-3
"""Level of the distribution tests. The seeds are fixed, so a pass stays a pass."""


@pytest.fixture(scope="module")
def photo() -> np.ndarray:
    return data.astronaut()


@pytest.fixture(scope="module")
def records() -> list[DegradationRecord]:
    rng = np.random.default_rng(20)
    return [sample_record(SEESR_TRAINING, rng, 512, 512) for _ in range(5000)]


def test_json_round_trip_of_the_record_makes_the_same_image(photo: np.ndarray) -> None:
    hq = photo[100:164, 200:264]
    for seed in range(40):
        lr, record = degrade(hq, SEESR_TRAINING, seed)
        again = DegradationRecord.from_dict(json.loads(json.dumps(record.to_dict())))
        assert again == record
        np.testing.assert_array_equal(apply_record(to_float(hq), again), lr)


def test_the_seed_decides_everything(photo: np.ndarray) -> None:
    first, record = degrade(photo[:64, :64], SEESR_TRAINING, 7)
    again, same = degrade(photo[:64, :64], SEESR_TRAINING, 7)
    other, different = degrade(photo[:64, :64], SEESR_TRAINING, 8)
    np.testing.assert_array_equal(first, again)
    assert record == same and record != different and (first != other).any()


@pytest.mark.parametrize("height, width", [(4, 4), (4, 50), (16, 16), (64, 64), (67, 130), (512, 512)])
def test_lr_is_a_quarter_of_any_size(photo: np.ndarray, height: int, width: int) -> None:
    for seed in range(3 if height == 512 else 40):
        lr, record = degrade(photo[:height, :width], SEESR_TRAINING, seed)
        assert lr.shape == (height // 4, width // 4, 3) and lr.dtype == np.uint8
        assert (record.height, record.width) == (height, width)


def test_lr_shows_the_target(photo: np.ndarray) -> None:
    hq = photo[0:256, 96:352]
    plain = to_uint8(resize(to_float(hq), 64, 64, "area")).astype(float)
    correlations = [np.corrcoef(degrade(hq, SEESR_TRAINING, s)[0].ravel(), plain.ravel())[0, 1] for s in range(20)]
    assert min(correlations) > 0.7 and np.median(correlations) > 0.9


def _plain_record() -> DegradationRecord:
    stage = Stage(BlurKernel("aniso", 9, 1.0, 2.0), Resize("down", 0.8, "area"), Noise("gaussian", 9.0, False, 1), 60)
    sinc = BlurKernel(SINC, 9, omega=1.5)
    return DegradationRecord(64, 64, stage, stage, sinc, "bilinear", True)


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
@pytest.mark.parametrize(
    "change",
    [
        {"blur": None},
        {"blur": BlurKernel("aniso", 9, 1.0, 2.0, rotation=1.0)},
        {"resize": Resize("down", 0.5, "area")},
        {"resize": Resize("down", 0.8, "bicubic")},
        {"noise": Noise("gaussian", 18.0, False, 1)},
        {"noise": Noise("gaussian", 9.0, True, 1)},
        {"noise": Noise("gaussian", 9.0, False, 2)},
        {"noise": Noise("poisson", 1.0, False, 1)},
        {"jpeg_quality": 30},
    ],
    ids=lambda change: str(next(iter(change.values()))),
)
def test_every_parameter_of_a_stage_reaches_the_image(photo: np.ndarray, stage: str, change: dict) -> None:
    hq, record = to_float(photo[100:164, 200:264]), _plain_record()
    changed = replace(record, **{stage: replace(getattr(record, stage), **change)})
    assert (apply_record(hq, changed) != apply_record(hq, record)).any()


@pytest.mark.parametrize("change", [{"final_sinc": None}, {"final_mode": "area"}, {"jpeg_last": False}])
def test_every_parameter_of_the_end_reaches_the_image(photo: np.ndarray, change: dict) -> None:
    hq, record = to_float(photo[100:164, 200:264]), _plain_record()
    assert (apply_record(hq, replace(record, **change)) != apply_record(hq, record)).any()


@pytest.mark.parametrize("jpeg_last", [True, False])
def test_the_order_of_the_last_steps(photo: np.ndarray, jpeg_last: bool) -> None:
    """With everything else neutral the end is A: resize, sinc, JPEG or B: JPEG, resize, sinc."""
    hq = to_float(photo[:128, :128])
    neutral = Stage(None, Resize("keep", 1.0, "area"), Noise("gaussian", 1e-30, True, 0), 100)
    sinc = BlurKernel(SINC, 15, omega=1.2)
    record = DegradationRecord(
        128, 128, neutral, replace(neutral, resize=Resize("up", 2.0, "area"), jpeg_quality=30), sinc,
        "bilinear", jpeg_last,
    )  # fmt: skip
    image = resize(jpeg(hq, 100), 64, 64, "area")
    if jpeg_last:
        image = jpeg(filter2d(resize(image, 32, 32, "bilinear"), sinc.render()), 30)
    else:
        image = filter2d(resize(jpeg(image, 30), 32, 32, "bilinear"), sinc.render())
    np.testing.assert_array_equal(apply_record(hq, record), to_uint8(image))
    other = apply_record(hq, replace(record, jpeg_last=not jpeg_last))
    assert np.abs(other.astype(int) - to_uint8(image)).max() > 3


def test_make_target_sharpens_only_when_asked(photo: np.ndarray) -> None:
    crop = photo[:128, 100:228]
    sharp = make_target(crop, SEESR_TRAINING)
    assert sharp.dtype == np.uint8 and sharp.astype(float).std() > crop.astype(float).std() + 1
    np.testing.assert_array_equal(make_target(crop, replace(SEESR_TRAINING, sharpen_target=False)), crop)


def test_bad_images_are_refused_with_what_was_expected(photo: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"uint8, got float32"):
        degrade(to_float(photo), SEESR_TRAINING, 0)
    with pytest.raises(ValueError, match=r"shape \(512, 512\)"):
        degrade(photo[..., 0], SEESR_TRAINING, 0)
    with pytest.raises(ValueError, match="at least 4x4 pixels, got 3x512"):
        degrade(photo[:3], SEESR_TRAINING, 0)
    record = sample_record(SEESR_TRAINING, np.random.default_rng(0), 64, 64)
    with pytest.raises(ValueError, match="64x64"):
        apply_record(to_float(photo[:32, :64]), record)
    with pytest.raises(ValueError, match="float32, got uint8"):
        apply_record(photo[:64, :64], record)


def test_an_incomplete_record_is_refused() -> None:
    data = sample_record(SEESR_TRAINING, np.random.default_rng(0), 64, 64).to_dict()
    del data["stage2"]
    with pytest.raises(ValueError, match=r"not a degradation record.*stage2"):
        DegradationRecord.from_dict(data)
    with pytest.raises(ValueError, match="not a degradation record"):
        DegradationRecord.from_dict({**data, "stage2": data["stage1"], "weather": "rain"})


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("sinc_prob", 1.2, "sinc_prob must be a probability"),
        ("kernel_probs", (0.5, 0.5), "kernel_probs must be 6 probabilities"),
        ("resize_probs", (0.5, 0.5, 0.5), "resize_probs must be 3 probabilities that sum to 1"),
        ("sigma_range", (0.0, 3.0), "sigma_range must be"),
        ("gaussian_sigma_range", (9.0, 3.0), "low <= high"),
        ("resize_range", (1.1, 1.5), "resize_range must contain 1"),
        ("jpeg_quality_range", (30, 101), "1..100"),
    ],
)
def test_impossible_configs_are_refused(field: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StageConfig(**{field: value})


def test_configs_hold_the_published_values() -> None:
    """docs/degradation.md, "Values"."""
    one, two = DegradationConfig().stage1, SEESR_TRAINING.stage2
    assert (one.resize_range, two.resize_range) == ((0.15, 1.5), (0.3, 1.2))
    assert (one.gaussian_sigma_range, two.gaussian_sigma_range) == ((1, 30), (1, 25))
    assert (one.poisson_scale_range, two.poisson_scale_range) == ((0.05, 3), (0.05, 2.5))
    assert (one.jpeg_quality_range, two.jpeg_quality_range) == ((30, 95), (30, 95))
    assert (one.blur_prob, two.blur_prob) == (1.0, 0.8)
    one, two = SEESR_LIGHT.stage1, SEESR_LIGHT.stage2
    assert (one.resize_range, two.resize_range) == ((0.3, 1.5), (0.6, 1.2))
    assert (one.gaussian_sigma_range, two.gaussian_sigma_range) == ((1, 15), (1, 12))
    assert (one.poisson_scale_range, two.poisson_scale_range) == ((0.05, 2), (0.05, 1))
    assert (one.jpeg_quality_range, two.jpeg_quality_range) == ((60, 95), (60, 100))
    assert (one.blur_prob, two.blur_prob) == (1.0, 0.5)
    for config in (SEESR_TRAINING, SEESR_LIGHT):
        assert (config.stage1.sigma_range, config.stage2.sigma_range) == ((0.2, 3), (0.2, 1.5))
        assert (config.stage1.resize_probs, config.stage2.resize_probs) == ((0.2, 0.7, 0.1), (0.3, 0.4, 0.3))
        assert (config.final_sinc_prob, config.jpeg_last_prob, config.sharpen_target) == (0.8, 0.5, True)
        for stage in (config.stage1, config.stage2):
            assert stage.kernel_probs == (0.45, 0.25, 0.12, 0.03, 0.12, 0.03)
            assert (stage.sinc_prob, stage.gaussian_noise_prob, stage.gray_noise_prob) == (0.1, 0.5, 0.4)
            assert (stage.generalized_beta_range, stage.plateau_beta_range) == ((0.5, 4), (1, 2))


def _assert_shares(values: list, expected: dict) -> None:
    counts = [values.count(key) for key in expected]
    assert sum(counts) == len(values)
    assert chisquare(counts, [share * len(values) for share in expected.values()]).pvalue > ALPHA


def _assert_uniform(values: list[float], low: float, high: float) -> None:
    assert min(values) >= low and max(values) <= high
    assert kstest(values, "uniform", args=(low, high - low)).pvalue > ALPHA


@pytest.mark.parametrize("number", [1, 2])
def test_draws_follow_the_config(records: list[DegradationRecord], number: int) -> None:
    config: StageConfig = getattr(SEESR_TRAINING, f"stage{number}")
    stages: list[Stage] = [getattr(record, f"stage{number}") for record in records]

    directions = dict(zip(("up", "down", "keep"), config.resize_probs, strict=True))
    _assert_shares([s.resize.direction for s in stages], directions)
    _assert_shares([s.resize.mode for s in stages], dict.fromkeys(RESIZE_MODES, 1 / 3))
    low, high = config.resize_range
    _assert_uniform([s.resize.factor for s in stages if s.resize.direction == "up"], 1.0, high)
    _assert_uniform([s.resize.factor for s in stages if s.resize.direction == "down"], low, 1.0)
    assert {s.resize.factor for s in stages if s.resize.direction == "keep"} == {1.0}

    _assert_shares([s.noise.kind for s in stages], {"gaussian": 0.5, "poisson": 0.5})
    for kind, bounds in (
        ("gaussian", config.gaussian_sigma_range),
        ("poisson", config.poisson_scale_range),
    ):
        _assert_uniform([s.noise.level for s in stages if s.noise.kind == kind], *bounds)
        _assert_shares([s.noise.gray for s in stages if s.noise.kind == kind], {True: 0.4, False: 0.6})
    assert len({s.noise.seed for s in stages}) == len(stages)
    _assert_shares([s.jpeg_quality for s in stages], dict.fromkeys(range(30, 96), 1 / 66))

    blurs = [s.blur for s in stages if s.blur is not None]
    skipped = len(stages) - len(blurs)
    assert skipped == 0 if number == 1 else binomtest(skipped, len(stages), 0.2).pvalue > ALPHA
    kinds = dict(zip(GAUSSIAN_KINDS, (0.9 * p for p in config.kernel_probs), strict=True)) | {SINC: 0.1}
    _assert_shares([b.kind for b in blurs], kinds)
    _assert_shares([b.size for b in blurs], dict.fromkeys(KERNEL_SIZES, 1 / 8))
    _assert_uniform([b.sigma_x for b in blurs if b.kind != SINC], *config.sigma_range)
    aniso = [b for b in blurs if b.kind.endswith("aniso")]
    _assert_uniform([b.sigma_y for b in aniso], *config.sigma_range)
    _assert_uniform([b.rotation for b in aniso], -pi, pi)
    generalized = [b.beta for b in blurs if b.kind.startswith("generalized")]
    _assert_uniform([beta for beta in generalized if beta < 1], 0.5, 1.0)
    _assert_uniform([beta for beta in generalized if beta >= 1], 1.0, 4.0)
    assert binomtest(sum(beta < 1 for beta in generalized), len(generalized), 0.5).pvalue > ALPHA
    plateau = [b.beta for b in blurs if b.kind.startswith("plateau")]
    assert binomtest(plateau.count(1.0), len(plateau), 0.5).pvalue > ALPHA


def test_draws_of_the_end_follow_the_config(records: list[DegradationRecord]) -> None:
    _assert_shares([r.jpeg_last for r in records], {True: 0.5, False: 0.5})
    _assert_shares([r.final_mode for r in records], dict.fromkeys(RESIZE_MODES, 1 / 3))
    _assert_shares([r.final_sinc is not None for r in records], {True: 0.8, False: 0.2})
    sincs = [r.final_sinc for r in records if r.final_sinc is not None]
    assert {s.kind for s in sincs} == {SINC}
    _assert_shares([s.size for s in sincs], dict.fromkeys(KERNEL_SIZES, 1 / 8))
    _assert_uniform([s.omega for s in sincs], pi / 3, pi)
