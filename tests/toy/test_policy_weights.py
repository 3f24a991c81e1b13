"""The shipped cold-started policy on held-out rows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from toy.evaluate_policy import Toy, decode, degradation_accuracy
from toy.rows import DEGRADATION, ToyRow, row
from vlcot.degradation import components, vocabulary
from vlcot.groups import Scored
from vlcot.rewards import understanding_reward
from vlcot.sequence import ParsedChain

pytestmark = pytest.mark.engine

ROWS = 64
DEGRADATION_ROWS = 1024
"""Many, because little of the degradation can be read (see the policy's card); only the first text is sampled."""
WEIGHTS = Path("toy/weights")


@pytest.fixture(scope="module")
def toy() -> Toy:
    torch.set_num_threads(1)
    return Toy.load(WEIGHTS / "policy", WEIGHTS / "vq")


@pytest.fixture(scope="module")
def rows() -> list[ToyRow]:
    return [row(i, "heldout") for i in range(ROWS)]


@pytest.fixture(scope="module")
def chains(toy: Toy, rows: list[ToyRow]) -> list[ParsedChain]:
    return toy.sample(rows, seed=0, temperature=1.0)


def test_format_rate_is_at_least_90_percent(chains: list[ParsedChain]) -> None:
    assert np.mean([chain.well_formed for chain in chains]) >= 0.9


def test_degradation_texts_have_a_known_phrase_at_each_of_the_eight_places(chains: list[ParsedChain]) -> None:
    allowed = vocabulary(DEGRADATION)
    lists = [components(chain.degradation or "") or () for chain in chains]
    right = [len(p) == len(allowed) and all(a in b for a, b in zip(p, allowed, strict=True)) for p in lists]
    assert np.mean(right) >= 0.9


def test_degradation_accuracy_is_clearly_above_shuffled_truths(toy: Toy) -> None:
    """Of nearly greedy texts: what the policy holds to be most likely. Sampled at 1, most of a text is chance
    (p = 0.001 on 2,048 rows, see the card)."""
    many = [row(i, "heldout") for i in range(DEGRADATION_ROWS)]
    result = degradation_accuracy(toy.degradations(many, seed=0, temperature=0.1), many)
    assert result.accuracy > result.shuffled and result.p_value < 0.001, result


def test_coarse_texts_name_the_objects_of_their_own_row(chains: list[ParsedChain], rows: list[ToyRow]) -> None:
    shown = [(chain.coarse, r.objects) for chain, r in zip(chains, rows, strict=True) if r.objects]
    scores = np.array([[_named(coarse, objects) for _, objects in shown] for coarse, _ in shown])
    assert np.trace(scores) / len(scores) > 2 * scores.mean()


def test_final_images_resemble_their_targets_more_than_those_of_other_rows(
    toy: Toy, chains: list[ParsedChain], rows: list[ToyRow]
) -> None:
    images = decode(toy.images, chains, step=2)
    pairs = [(a.astype(float), r.hq.astype(float)) for a, r in zip(images, rows, strict=True) if a is not None]
    errors = np.array([[((a - hq) ** 2).mean() for _, hq in pairs] for a, _ in pairs])
    assert np.trace(errors) / len(errors) < 0.5 * errors.mean()


def test_the_checkpoint_is_small_and_complete() -> None:
    directory = WEIGHTS / "policy"
    assert (directory / "model.safetensors").stat().st_size <= 5_000_000
    assert {"config.json", "tokenizer.json", "README.md"} <= {path.name for path in directory.iterdir()}


def _named(coarse: str | None, objects: tuple[str, ...]) -> float:
    score = understanding_reward(coarse, objects)
    assert isinstance(score, Scored)
    return score.value
