"""The tagger's question and answer, without any engine: names of the objects in an image, as a JSON list.

It stands in for the published demo's tagger (RAM) in the paper's tag ablation: its names go to Grounded-SAM as a
vocabulary, or are taken as the main objects themselves.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from reward_servers.checks import check_count, check_question
from reward_servers.contract import RewardServerError, Tags
from reward_servers.detection import clean_names
from reward_servers.json_answer import excerpt, list_schema, read_list

LONGEST_NAME = 40
"""Characters of a name."""

_QUESTION = """\
List the objects that you can see in this photograph, the most important one first: at most {count} common nouns in \
lower case and in the singular, each once, nothing that you only guess. Answer with JSON only: \
{"objects":["dog","park bench"]}"""


@dataclass(frozen=True)
class TagPrompt:
    """What the tagger is asked, after the image.

    Attributes:
        question: ``{count}`` becomes ``max_names``.
        max_names: most names.
    """

    question: str = _QUESTION
    max_names: int = 12

    def __post_init__(self) -> None:
        check_question("qwen_vl.tag_prompt.question", self.question)
        check_count("qwen_vl.tag_prompt.max_names", self.max_names)


def chat(prompt: TagPrompt) -> list[dict[str, Any]]:
    """Messages for the processor's chat template: image, question."""
    question = prompt.question.replace("{count}", str(prompt.max_names))
    return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]


def answer_schema(max_names: int) -> dict[str, Any]:
    """JSON schema of an answer. Names are plain English letters: GroundingDINO's tokenizer knows every one of them."""
    # The length is in the pattern: xgrammar takes no pattern beside a maxLength.
    name = {"type": "string", "pattern": f"^[a-z][a-z -]{{1,{LONGEST_NAME - 1}}}$"}
    return list_schema("objects", name, 1, max_names)


def longest_answer(max_names: int) -> int:
    """Characters of the longest answer of the schema, which is as many tokens where a model spells it out."""
    return len(json.dumps({"objects": ["x" * LONGEST_NAME] * max_names}, separators=(",", ":")))


def parse_answer(text: str, max_names: int) -> Tags:
    """The names of an answer, cleaned as a vocabulary is, without repetitions, at most ``max_names``.

    Raises:
        RewardServerError: the text is no JSON object with a list of names, or a name no vocabulary may hold.
    """
    names = read_list(text, "objects", "tagger")
    try:
        return Tags(clean_names(names, "the tagger's answer")[:max_names])
    except ValueError as error:
        raise RewardServerError(f"{error}: {excerpt(text)}") from error
