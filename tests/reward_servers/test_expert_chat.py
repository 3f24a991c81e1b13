"""The visual expert's prompt, schema, parser and image order, without an engine."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reward_servers.contract import Judgement, RewardServerError
from reward_servers.expert_chat import (
    SCORE_NAMES,
    ExpertPrompt,
    answer_schema,
    average,
    chat,
    in_sent_order,
    parse_answer,
    shown_orders,
    write_answer,
)

pytestmark = pytest.mark.unit

GOOD = '{"scores":[{"quality":7,"realism":10,"consistency":0},{"quality":1,"realism":2,"consistency":3}]}'


def test_reference_comes_first_then_labelled_images_then_rubric() -> None:
    (message,) = chat(ExpertPrompt("Rate {count}.", "Ref", "Number {index}"), 2)
    assert message["role"] == "user"
    assert [part.get("text", part["type"]) for part in message["content"]] == [
        "Ref", "image", "Number 1", "image", "Number 2", "image", "Rate 2.",
    ]  # fmt: skip


def test_empty_labels_leave_no_text_part() -> None:
    (message,) = chat(ExpertPrompt("Rate.", "", ""), 3)
    assert [part["type"] for part in message["content"]] == ["image"] * 4 + ["text"]


def test_default_rubric_names_scores_range_and_count() -> None:
    rubric = chat(ExpertPrompt(), 5)[0]["content"][-1]["text"]
    assert all(name in rubric for name in SCORE_NAMES)
    assert "The 5 images" in rubric and "0 to 10" in rubric and "{count}" not in rubric


def test_prompt_travels_with_its_checkpoint(tmp_path) -> None:
    assert ExpertPrompt.of_checkpoint(tmp_path) == ExpertPrompt()
    prompt = ExpertPrompt("a", "b", "c {index}")
    prompt.save(tmp_path)
    assert ExpertPrompt.of_checkpoint(tmp_path) == prompt
    (tmp_path / "expert_prompt.json").write_text('{"question": "a"}')
    with pytest.raises(ValueError, match=r"expert_prompt\.json must hold"):
        ExpertPrompt.of_checkpoint(tmp_path)


def test_answer_is_written_compactly_and_parsed_back() -> None:
    first, second = parse_answer(GOOD, 2)
    assert (first, second) == (Judgement(7.0, 10.0, 0.0), Judgement(1.0, 2.0, 3.0))
    assert write_answer(json.loads(GOOD)["scores"]) == GOOD


def test_spaces_and_line_breaks_are_fine() -> None:
    assert parse_answer(json.dumps(json.loads(GOOD), indent=2), 2) == parse_answer(GOOD, 2)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "not JSON"),
        (GOOD[:-3], "not JSON"),
        ("The first is best. " + GOOD, "not JSON"),
        ("[1, 2]", "no list 'scores'"),
        ('{"scores": 3}', "no list 'scores'"),
        ('{"scores": []}', "scored 0 images of 2"),
        (GOOD.replace("]}", ',{"quality":1,"realism":2,"consistency":3}]}'), "scored 3 images of 2"),
        (GOOD.replace("realism", "reality"), "other keys"),
        (GOOD.replace("7", "11"), "quality is 11"),
        (GOOD.replace("7", "-1"), "quality is -1"),
        (GOOD.replace("7", "7.5"), r"quality is 7\.5"),
        (GOOD.replace("7", "true"), "quality is True"),
        (GOOD.replace("7", "NaN"), "quality is nan"),
        (GOOD.replace("7", "null"), "quality is None"),
        (GOOD.replace("7", '"7"'), "quality is '7'"),
    ],
)
def test_an_unusable_answer_is_an_error_and_never_a_number(text: str, why: str) -> None:
    """Pitfalls Part 2, 11: an unparsable reply must not become a score."""
    with pytest.raises(RewardServerError, match=why):
        parse_answer(text, 2)


@given(text=st.text(max_size=60) | st.recursive(st.none() | st.integers(), st.lists).map(json.dumps))
@settings(max_examples=100, deadline=None)
def test_parser_is_total(text: str) -> None:
    try:
        parse_answer(text, 1)
    except RewardServerError:
        return
    assert json.loads(text)["scores"]


@pytest.mark.parametrize("text", ["[" * 100_000, GOOD.replace("7", "7" * 5000)])
def test_what_python_json_cannot_read_is_an_unusable_answer(text: str) -> None:
    with pytest.raises(RewardServerError, match="not JSON"):
        parse_answer(text, 2)


def test_schema_asks_for_exactly_the_scores_of_each_image() -> None:
    scores = answer_schema(4)["properties"]["scores"]
    assert (scores["minItems"], scores["maxItems"]) == (4, 4)
    assert scores["items"]["required"] == list(SCORE_NAMES)
    assert scores["items"]["properties"]["quality"] == {"type": "integer", "minimum": 0, "maximum": 10}


@pytest.mark.parametrize("seed", range(5))
def test_shuffled_answers_return_to_the_order_sent(seed: int) -> None:
    (order,) = shown_orders(6, 1, seed)
    shown = [Judgement(float(image), 0.0, 0.0) for image in order]
    assert [j.quality for j in in_sent_order(shown, order)] == [0, 1, 2, 3, 4, 5]


def test_orders_are_seeded_and_vary() -> None:
    assert shown_orders(8, 2, 3) == shown_orders(8, 2, 3)
    assert len({tuple(shown_orders(8, 1, seed)[0]) for seed in range(20)}) > 15


def _judged_with_bias(true: np.ndarray, bias: np.ndarray, rounds: int, seed: int) -> np.ndarray:
    """Mean quality from an expert that adds `bias` by position shown."""
    judged = []
    for order in shown_orders(len(true), rounds, seed):
        shown = [Judgement(float(true[image] + bias[place]), 0.0, 0.0) for place, image in enumerate(order)]
        judged.append(in_sent_order(shown, order))
    return np.array([j.quality for j in average(judged)])


@pytest.mark.parametrize("count", [1, 2, 5, 8])
def test_planted_positional_bias_is_averaged_out(count: int) -> None:
    true, bias = np.linspace(2, 5, count), np.linspace(0, 4, count) ** 2 / 4
    exact = _judged_with_bias(true, bias, rounds=count, seed=1)
    np.testing.assert_allclose(exact - bias.mean(), true, atol=1e-12)


def test_more_rounds_leave_less_of_a_positional_bias() -> None:
    true, bias = np.full(8, 5.0), np.linspace(0, 4, 8)

    def left(rounds: int) -> float:
        spreads = [_judged_with_bias(true, bias, rounds, seed).std() for seed in range(20)]
        return float(np.mean(spreads))

    assert left(1) > 1.2
    assert left(2) < 0.8 * left(1)
    assert left(4) < 0.5 * left(1)
    assert left(16) == pytest.approx(0, abs=1e-12)
