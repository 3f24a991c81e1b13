"""The tagger's prompt, schema and parser, without an engine."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reward_servers.contract import RewardServerError
from reward_servers.detection import clean_names
from reward_servers.tag_chat import TagPrompt, answer_schema, chat, longest_answer, parse_answer

pytestmark = pytest.mark.unit


def test_the_question_follows_the_image_and_says_how_many() -> None:
    (message,) = chat(TagPrompt(max_names=7))
    image, question = message["content"]
    assert image == {"type": "image"} and "at most 7 " in question["text"] and "{count}" not in question["text"]


def test_names_are_cleaned_as_a_vocabulary_is_and_capped() -> None:
    answer = json.dumps({"objects": ["Cat", "park  bench", "cat", "", " Tree ", "cup", "moon"]})
    assert parse_answer(answer, 4).names == ("cat", "park bench", "tree", "cup")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "not JSON"),
        ('{"objects":["cat"', "not JSON"),
        ("[" * 100_000, "not JSON"),
        ('["cat"]', "no list 'objects'"),
        ('{"objects":"cat"}', "no list 'objects'"),
        ('{"objects":[]}', "no name"),
        ('{"objects":[" "]}', "no name"),
        ('{"objects":["cat",3]}', "list of names"),
        ('{"objects":["no. 5"]}', "no. 5"),
    ],
)
def test_an_unusable_answer_is_an_error(text: str, why: str) -> None:
    with pytest.raises(RewardServerError, match=re.escape(why)):
        parse_answer(text, 4)


_NAME = re.compile(answer_schema(4)["properties"]["objects"]["items"]["pattern"])


@given(names=st.lists(st.from_regex(_NAME, fullmatch=True), min_size=1, max_size=4))
@settings(max_examples=50, deadline=None)
def test_what_the_schema_allows_is_a_vocabulary_and_fits(names: list[str]) -> None:
    answer = json.dumps({"objects": names}, separators=(",", ":"))
    assert parse_answer(answer, 4).names == clean_names(names, "x")
    assert len(answer) <= longest_answer(4)


@pytest.mark.parametrize("name", ["Cat", "3", "no. 5", "why?", "猫", "x" * 41, " cat", ""])
def test_the_schema_refuses_what_the_detector_cannot_read(name: str) -> None:
    assert _NAME.fullmatch(name) is None


@pytest.mark.parametrize(("field", "value"), [("question", ""), ("max_names", 0), ("max_names", True)])
def test_an_impossible_prompt_is_refused(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"qwen_vl\.tag_prompt\.{field} must"):
        TagPrompt(**{field: value})
