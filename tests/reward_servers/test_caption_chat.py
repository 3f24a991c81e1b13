"""The captioner's dialogue: rounds, pictures and answers, without an engine."""

from __future__ import annotations

import numpy as np
import pytest

from reward_servers.caption_chat import CaptionPrompt, caption_text, chat, shown_sizes
from reward_servers.contract import RewardServerError
from vlcot.images import area_downscale

pytestmark = pytest.mark.unit


def test_every_round_follows_all_that_was_said() -> None:
    prompt = CaptionPrompt("Main?", "Parts?", "Texture?")
    messages = chat(prompt, ["A cat.", "Ears."])
    assert [(m["role"], [part.get("text", "image") for part in m["content"]]) for m in messages] == [
        ("user", ["image", "Main?"]),
        ("assistant", ["A cat."]),
        ("user", ["image", "Parts?"]),
        ("assistant", ["Ears."]),
        ("user", ["image", "Texture?"]),
    ]
    assert [m["role"] for m in chat(prompt, [])] == ["user"]


def test_pictures_grow_and_are_the_chains_own_targets() -> None:
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    pictures = [np.asarray(picture) for picture in shown_sizes(image)]
    for picture, side in zip(pictures, (16, 32, 64), strict=True):
        np.testing.assert_array_equal(picture, area_downscale(image, side))


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((64, 32, 3), np.uint8),
        np.zeros((66, 66, 3), np.uint8),
        np.zeros((64, 64, 3)),
        np.zeros((0, 0, 3), np.uint8),
        np.zeros((64, 64), np.uint8),
        [[1]],
    ],
)
def test_an_image_without_a_quarter_is_refused(image: object) -> None:
    with pytest.raises(ValueError, match="uint8"):
        shown_sizes(image)


@pytest.mark.parametrize(
    ("answer", "complete", "text"),
    [
        ("  A cat\n on a mat. ", True, "A cat on a mat."),
        ("A cat on a mat", True, "A cat on a mat"),
        ("A cat. It sits on a m", False, "A cat."),
        ("Is it 3.5 m long? It is wi", False, "Is it 3.5 m long?"),
        ("A cat. It sits.", False, "A cat. It sits."),
        ("A cat on a m", False, "A cat on a"),
        ("Antidisestab", False, "Antidisestab"),
    ],
)
def test_an_answer_is_one_line_of_whole_sentences(answer: str, complete: bool, text: str) -> None:
    assert caption_text(answer, complete) == text


@pytest.mark.parametrize("complete", [True, False])
def test_an_empty_answer_is_an_error(complete: bool) -> None:
    with pytest.raises(RewardServerError, match="empty"):
        caption_text(" \n ", complete)


@pytest.mark.parametrize(
    ("field", "value"), [("coarse", " "), ("fine", 3), ("middle_tokens", 0), ("fine_tokens", True)]
)
def test_an_impossible_prompt_is_refused(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"qwen_vl\.caption_prompt\.{field} must"):
        CaptionPrompt(**{field: value})
