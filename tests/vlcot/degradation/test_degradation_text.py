"""The description of a degradation and its comparison."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from vlcot.degradation import (
    COMPONENT_COUNT,
    SEESR_LIGHT,
    SEESR_TRAINING,
    DegradationConfig,
    DegradationRecord,
    components,
    describe,
    fraction_correct,
    sample_record,
    vocabulary,
)
from vlcot.degradation.kernels import BlurKernel
from vlcot.degradation.record import Noise, Resize, Stage
from vlcot.degradation.text import third_edges

pytestmark = pytest.mark.unit

EXAMPLE = (
    "[medium blur, heavy downscale, light gaussian noise, heavy compression; "
    "no blur, upscale, medium poisson noise, light compression]"
)
ONE = Stage(BlurKernel("iso", 7, 1.5, 1.5), Resize("down", 0.2, "area"), Noise("gaussian", 3.0, False, 1), 40)
TWO = Stage(None, Resize("up", 1.1, "area"), Noise("poisson", 1.0, True, 2), 90)
RECORD = DegradationRecord(64, 64, ONE, TWO, BlurKernel("sinc", 9, omega=2.0), "area", True)


def _said(position: int, stage1: Stage = ONE, stage2: Stage = TWO) -> str:
    said = components(describe(replace(RECORD, stage1=stage1, stage2=stage2), SEESR_TRAINING))
    assert said is not None
    return said[position]


def _with_sigma(stage: Stage, x: float, y: float | None = None) -> Stage:
    return replace(stage, blur=BlurKernel("aniso", 7, x, x if y is None else y))


def test_description_has_exactly_the_documented_form() -> None:
    assert describe(RECORD, SEESR_TRAINING) == EXAMPLE


EDGES = {
    "blur 1": (SEESR_TRAINING.stage1.sigma_range, 1.1333, 2.0667),
    "blur 2": (SEESR_TRAINING.stage2.sigma_range, 0.6333, 1.0667),
    "gaussian 1": (SEESR_TRAINING.stage1.gaussian_sigma_range, 10.6667, 20.3333),
    "gaussian 2": (SEESR_TRAINING.stage2.gaussian_sigma_range, 9, 17),
    "poisson 1": (SEESR_TRAINING.stage1.poisson_scale_range, 1.0333, 2.0167),
    "poisson 2": (SEESR_TRAINING.stage2.poisson_scale_range, 0.8667, 1.6833),
    "jpeg": (SEESR_TRAINING.stage1.jpeg_quality_range, 51.6667, 73.3333),
    "downscale 1": ((SEESR_TRAINING.stage1.resize_range[0], 1.0), 0.4333, 0.7167),
}


@pytest.mark.parametrize("name", EDGES)
def test_edges_are_the_literal_numbers_of_the_table(name: str) -> None:
    """docs/degradation.md, "Description"."""
    bounds, *expected = EDGES[name]
    assert third_edges(bounds) == pytest.approx(expected, abs=5e-5)


@pytest.mark.parametrize(
    "value, level",
    [(0.2, "light"), (1.1333, "light"), (1.1334, "medium"), (2.0666, "medium"), (2.0667, "heavy"), (3, "heavy")],
)
def test_blur_of_stage_one(value: float, level: str) -> None:
    assert _said(0, _with_sigma(ONE, value)) == f"{level} blur"


@pytest.mark.parametrize("value, level", [(0.6333, "light"), (0.6334, "medium"), (1.0667, "heavy")])
def test_blur_of_stage_two(value: float, level: str) -> None:
    assert _said(4, stage2=_with_sigma(TWO, value)) == f"{level} blur"


def test_blur_of_two_sigmas_is_their_geometric_mean() -> None:
    # Geometric mean 0.949 is light; the arithmetic mean 1.65 would be medium, the larger one heavy.
    assert _said(0, _with_sigma(ONE, 0.3, 3.0)) == "light blur"


def test_blur_without_a_sigma_and_without_a_kernel() -> None:
    sinc = BlurKernel("sinc", 9, omega=2.0)
    assert _said(0, replace(ONE, blur=sinc)) == "ringing blur"
    assert _said(4, stage2=replace(TWO, blur=sinc)) == "ringing blur"
    assert _said(4) == "no blur"


@pytest.mark.parametrize(
    "direction, factor, phrase",
    [
        ("down", 1.0, "light downscale"),
        ("down", 0.7167, "light downscale"),
        ("down", 0.7166, "medium downscale"),
        ("down", 0.4334, "medium downscale"),
        ("down", 0.4333, "heavy downscale"),
        ("down", 0.15, "heavy downscale"),
        ("up", 1.4, "upscale"),
        ("keep", 1.0, "no resize"),
    ],
)
def test_resize_of_stage_one(direction: str, factor: float, phrase: str) -> None:
    assert _said(1, replace(ONE, resize=Resize(direction, factor, "area"))) == phrase


@pytest.mark.parametrize("factor, level", [(0.7667, "light"), (0.7666, "medium"), (0.5333, "heavy")])
def test_resize_of_stage_two_has_its_own_range(factor: float, level: str) -> None:
    assert _said(5, stage2=replace(TWO, resize=Resize("down", factor, "area"))) == f"{level} downscale"


@pytest.mark.parametrize(
    "position, kind, value, level",
    [
        (2, "gaussian", 10.6666, "light"),
        (2, "gaussian", 10.6667, "medium"),
        (2, "gaussian", 20.3334, "heavy"),
        (2, "poisson", 1.0333, "light"),
        (2, "poisson", 1.0334, "medium"),
        (2, "poisson", 2.0167, "heavy"),
        (6, "gaussian", 8.9999, "light"),
        (6, "gaussian", 9.0, "medium"),
        (6, "gaussian", 17.0, "heavy"),
        (6, "poisson", 0.8666, "light"),
        (6, "poisson", 0.8667, "medium"),
        (6, "poisson", 1.6834, "heavy"),
    ],
)
def test_noise_has_the_level_of_its_own_range(position: int, kind: str, value: float, level: str) -> None:
    noise = Noise(kind, value, False, 1)
    assert _said(position, replace(ONE, noise=noise), replace(TWO, noise=noise)) == f"{level} {kind} noise"


@pytest.mark.parametrize(
    "quality, level",
    [(30, "heavy"), (51, "heavy"), (52, "medium"), (73, "medium"), (74, "light"), (95, "light")],
)
def test_compression_is_quality_reversed(quality: int, level: str) -> None:
    stage1, stage2 = replace(ONE, jpeg_quality=quality), replace(TWO, jpeg_quality=quality)
    assert _said(3, stage1, stage2) == _said(7, stage1, stage2) == f"{level} compression"


def test_edges_come_from_the_config() -> None:
    # Quality 70 is medium in 30..95 and heavy in 60..95.
    record = replace(RECORD, stage1=replace(ONE, jpeg_quality=70))
    assert "medium compression;" in describe(record, SEESR_TRAINING)
    assert "heavy compression;" in describe(record, SEESR_LIGHT)


def test_the_end_of_the_pipeline_is_not_described() -> None:
    other = replace(RECORD, final_sinc=None, final_mode="bicubic", jpeg_last=False)
    assert describe(other, SEESR_TRAINING) == EXAMPLE


def _drawn(config: DegradationConfig, count: int) -> list[tuple[str, ...]]:
    rng = np.random.default_rng(3)
    texts = [describe(sample_record(config, rng, 64, 64), config) for _ in range(count)]
    return [parts for parts in map(components, texts) if parts is not None]


@pytest.fixture(scope="module")
def said() -> list[tuple[str, ...]]:
    return _drawn(SEESR_TRAINING, 5000)


def _assert_covers(vocabularies: list[tuple[str, ...]], said: list[tuple[str, ...]]) -> None:
    assert len(vocabularies) == COMPONENT_COUNT
    for position, phrases in enumerate(vocabularies):
        assert {parts[position] for parts in said} == set(phrases)
        assert len(phrases) == len(set(phrases))


def test_vocabulary_is_what_descriptions_say(said: list[tuple[str, ...]]) -> None:
    _assert_covers(vocabulary(SEESR_TRAINING), said)
    _assert_covers(vocabulary(SEESR_LIGHT), _drawn(SEESR_LIGHT, 500))


def test_vocabulary_leaves_out_what_cannot_be_drawn() -> None:
    stage = replace(SEESR_TRAINING.stage1, sinc_prob=0.0, gaussian_noise_prob=1.0, resize_probs=(0, 1, 0))
    blur, resize, noise, compression = vocabulary(replace(SEESR_TRAINING, stage1=stage))[:4]
    assert blur == ("light blur", "medium blur", "heavy blur")
    assert resize == ("light downscale", "medium downscale", "heavy downscale")
    assert noise == ("light gaussian noise", "medium gaussian noise", "heavy gaussian noise")
    assert compression == ("light compression", "medium compression", "heavy compression")


def test_levels_of_a_uniform_parameter_are_equally_frequent(said: list[tuple[str, ...]]) -> None:
    for position, thing in [
        (1, "downscale"), (2, "gaussian noise"), (2, "poisson noise"), (3, "compression"),
        (5, "downscale"), (6, "gaussian noise"), (6, "poisson noise"), (7, "compression"),
    ]:  # fmt: skip
        counts = [
            sum(parts[position] == f"{level} {thing}" for parts in said) for level in ("light", "medium", "heavy")
        ]
        assert min(counts) > 500
        assert chisquare(counts).pvalue > 1e-3


def test_components_normalise_case_and_spaces_and_take_the_first_list() -> None:
    assert components("It shows [ Light  Blur,UPSCALE ;\n no resize] and [heavy blur]") == (
        "light blur",
        "upscale",
        "no resize",
    )
    assert components("[a,,b]") == ("a", "", "b")
    assert components("[]") == components("[ ]") == ()
    for text in ("", "light blur", "[light blur", "light blur]", "][", "[[["):
        assert components(text) is None


@given(st.text(alphabet=st.characters() | st.sampled_from("[],; ")))
@settings(deadline=None, derandomize=True)
def test_components_is_total_and_idempotent(text: str) -> None:
    """A model may write any string; nothing it says may raise."""
    parts = components(text)
    if parts is None:
        assert components(f"{text}[a; b]") == ("a", "b")
    else:
        assert all(part == " ".join(part.split()) and "," not in part and ";" not in part for part in parts)
        assert components(f"[{', '.join(parts)}]") == parts
    assert 0.0 <= fraction_correct(text, EXAMPLE) <= 1.0


@given(st.integers(0, 2**32 - 1))
@settings(deadline=None, derandomize=True)
def test_only_the_truth_is_fully_correct(seed: int) -> None:
    truth = describe(sample_record(SEESR_TRAINING, np.random.default_rng(seed), 64, 64), SEESR_TRAINING)
    assert fraction_correct(truth, truth) == 1.0
    parts = components(truth)
    assert parts is not None
    for position, phrases in enumerate(vocabulary(SEESR_TRAINING)):
        wrong = list(parts)
        wrong[position] = next(phrase for phrase in phrases if phrase != parts[position])
        assert fraction_correct(f"[{', '.join(wrong)}]", truth) == 7 / 8


def test_missing_and_surplus_components_do_not_pay() -> None:
    inside = EXAMPLE.strip("[]")
    assert fraction_correct(EXAMPLE.upper(), EXAMPLE) == 1.0
    assert fraction_correct("no list here", EXAMPLE) == 0.0
    assert fraction_correct("[]", EXAMPLE) == 0.0
    assert fraction_correct("[medium blur, heavy downscale]", EXAMPLE) == 2 / 8
    assert fraction_correct(f"[{inside}, {inside}]", EXAMPLE) == 8 / 16
    everything = ", ".join(phrase for phrases in vocabulary(SEESR_TRAINING) for phrase in phrases)
    assert fraction_correct(f"[{everything}]", EXAMPLE) <= 1 / 8
    assert fraction_correct(f"[nonsense, {inside}]", EXAMPLE) == 0.0


@pytest.mark.parametrize("truth", ["", "[light blur]", "no list"])
def test_a_broken_truth_is_an_error_and_not_a_score(truth: str) -> None:
    with pytest.raises(ValueError, match="8 components"):
        fraction_correct(EXAMPLE, truth)
