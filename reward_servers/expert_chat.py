"""The visual expert's question and answer, without any engine: chat, JSON schema, parsing, image order.

The paper's expert (Qwen2.5-VL) sees the outputs of a group together and gives each one quality, realism and
consistency. Its prompt and scale are not published (domain facts 4.3), so they are stated here: integers from
0 to 10, the LR image as reference, one JSON object as answer::

    {"scores":[{"quality":7,"realism":6,"consistency":8}, ...]}

On request every entry ends with a short rationale.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from reward_servers.contract import Judgement, RewardServerError
from reward_servers.json_answer import excerpt, list_schema, read_list

PROMPT_FILE = "expert_prompt.json"
SCORE_NAMES = ("quality", "realism", "consistency")
MAX_SCORE = 10
"""Both the upper end of each score and :data:`vlcot.rewards.EXPERT_SCALE`."""

_RUBRIC = """\
You are an expert judge of photographic restoration. The first image above is a low-resolution reference, enlarged \
without adding detail. The {count} images after it are independent attempts to restore it, in the order shown. \
Compare the attempts with each other and with the reference, and give every attempt three integer scores from 0 to 10.
quality: technical fidelity of the picture. 10 is sharp and clean; take points off for blur, noise, ringing, blocks \
and compression marks. 0 is unusable.
realism: how much it looks like an untouched photograph. 10 has believable texture and light everywhere; take points \
off for plastic or smeared surfaces, invented patterns and wrong anatomy. An empty or noisy picture gets 0.
consistency: agreement with the reference. 10 shows the same scene with the same layout, colours and objects; take \
points off for anything moved, added, removed or recoloured. A different scene gets 0.
Use the whole range, and give equal scores only to attempts that you cannot tell apart. Answer with JSON only, one \
entry for each attempt in the order shown: {"scores":[{"quality":7,"realism":6,"consistency":8}]}"""

MAX_RATIONALE = 200
"""Characters of a rationale."""

_RATIONALE = """Add to every entry, after its scores, a "rationale": what decided them, in at most 20 words, as in \
{"scores":[{"quality":7,"realism":6,"consistency":8,"rationale":"leaves are sharp, the sky is smeared"}]}"""


@dataclass(frozen=True)
class ExpertPrompt:
    """What the expert is asked, after the images.

    Attributes:
        rubric: the question; ``{count}`` becomes the number of restorations.
        reference_label: text before the LR image, may be empty.
        image_label: text before each restoration, ``{index}`` counts from 1; may be empty.
        rationale: asked after the rubric where a rationale is wanted.
    """

    rubric: str = _RUBRIC
    reference_label: str = "Reference:"
    image_label: str = "Attempt {index}:"
    rationale: str = _RATIONALE

    def __post_init__(self) -> None:
        for part in fields(self):
            if not isinstance(getattr(self, part.name), str):
                raise ValueError(f"qwen_vl.prompt.{part.name} must be text, got {getattr(self, part.name)!r}")

    @classmethod
    def of_checkpoint(cls, folder: str | Path) -> ExpertPrompt:
        """The prompt in the checkpoint's ``expert_prompt.json``, for an expert trained on one; else the default.

        Raises:
            ValueError: the file is not a JSON object of this class's fields.
        """
        path = Path(folder) / PROMPT_FILE
        if not path.is_file():
            return cls()
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path} must hold a JSON object with keys of ExpertPrompt: {error}") from error

    def save(self, folder: str | Path) -> None:
        """Write ``expert_prompt.json`` into a checkpoint."""
        text = json.dumps(asdict(self), indent=2) + "\n"
        (Path(folder) / PROMPT_FILE).write_text(text, encoding="utf-8")


def chat(prompt: ExpertPrompt, count: int, rationale: bool = False) -> list[dict[str, Any]]:
    """Messages for the processor's chat template: reference image, ``count`` restorations, rubric."""
    labels = [prompt.reference_label]
    labels += [prompt.image_label.replace("{index}", str(index)) for index in range(1, count + 1)]
    content: list[dict[str, str]] = []
    for label in labels:
        if label:
            content.append({"type": "text", "text": label})
        content.append({"type": "image"})
    question = prompt.rubric.replace("{count}", str(count))
    content.append({"type": "text", "text": f"{question}\n{prompt.rationale}" if rationale else question})
    return [{"role": "user", "content": content}]


def answer_schema(count: int, rationale: bool = False) -> dict[str, Any]:
    """JSON schema that an answer about ``count`` restorations must follow."""
    score = {"type": "integer", "minimum": 0, "maximum": MAX_SCORE}
    properties: dict[str, Any] = dict.fromkeys(SCORE_NAMES, score)
    if rationale:
        properties["rationale"] = {"type": "string", "minLength": 1, "maxLength": MAX_RATIONALE}
    entry = {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }
    return list_schema("scores", entry, count, count)


def write_answer(scores: Sequence[Mapping[str, int]]) -> str:
    """The compact JSON of an answer, in the key order of :data:`SCORE_NAMES`."""
    entries = [{name: entry[name] for name in SCORE_NAMES} for entry in scores]
    return json.dumps({"scores": entries}, separators=(",", ":"))


def longest_answer(count: int, rationale: bool = False) -> int:
    """Characters of the longest answer, which is as many tokens where a model spells it out letter by letter."""
    scores = write_answer([dict.fromkeys(SCORE_NAMES, MAX_SCORE)] * count)
    return len(scores) + (count * (len(',"rationale":""') + MAX_RATIONALE) if rationale else 0)


def parse_answer(text: str, count: int, rationale: bool = False) -> list[Judgement]:
    """Judgements of ``count`` restorations in the order they were shown.

    Raises:
        RewardServerError: the text is not one JSON object of the schema with exactly ``count`` entries.
    """
    scores = read_list(text, "scores", "expert")
    if len(scores) != count:
        raise RewardServerError(f"the expert scored {len(scores)} images of {count}: {excerpt(text)}")
    return [_judgement(entry, text, rationale) for entry in scores]


def shown_orders(count: int, rounds: int, seed: int | Sequence[int]) -> list[list[int]]:
    """Orders in which ``rounds`` requests show the restorations: position ``p`` of a round shows image ``order[p]``.

    The first order is random, the others turn it round by equal parts, so a number of rounds that is a multiple of
    ``count`` shows every image equally often at every position, and a preference for a position cancels out of the
    mean. Fewer rounds spread an image's positions as far as they go.
    """
    rng = np.random.default_rng(seed)
    orders: list[list[int]] = []
    for start in range(0, rounds, count):
        turns = min(count, rounds - start)
        first = rng.permutation(count)
        orders += [np.roll(first, turn * count // turns).tolist() for turn in range(turns)]
    return orders


def in_sent_order(judgements: Sequence[Judgement], order: Sequence[int]) -> list[Judgement]:
    """Judgements by position shown, put back into the order in which the images were sent."""
    sent: dict[int, Judgement] = dict(zip(order, judgements, strict=True))
    return [sent[index] for index in range(len(order))]


def average(rounds: Sequence[Sequence[Judgement]]) -> list[Judgement]:
    """Mean judgement per image over several rounds, all in the same image order, with the first round's rationale."""
    means = np.mean([[[getattr(j, name) for name in SCORE_NAMES] for j in judged] for judged in rounds], axis=0)
    reasons = [judged.rationale for judged in rounds[0]]
    return [
        Judgement(float(quality), float(realism), float(consistency), reason)
        for (quality, realism, consistency), reason in zip(means, reasons, strict=True)
    ]


def _judgement(entry: object, text: str, rationale: bool) -> Judgement:
    keys = (*SCORE_NAMES, "rationale") if rationale else SCORE_NAMES
    if not isinstance(entry, dict) or set(entry) != set(keys):
        raise RewardServerError(f"an entry of the expert's answer has other keys than {keys}: {excerpt(text)}")
    for name in SCORE_NAMES:
        value = entry[name]
        # bool is an int for Python; true is no score.
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= MAX_SCORE:
            raise RewardServerError(f"the expert's {name} is {value!r}, not an integer from 0 to {MAX_SCORE}")
    reason = entry.get("rationale", "")
    if not isinstance(reason, str) or len(reason) > MAX_RATIONALE:
        raise RewardServerError(
            f"the expert's rationale is no text of up to {MAX_RATIONALE} characters: {reason!r:.200}"
        )
    return Judgement(**{name: float(entry[name]) for name in SCORE_NAMES}, rationale=" ".join(reason.split()))
