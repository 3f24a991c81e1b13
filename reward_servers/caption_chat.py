"""The captioner's dialogue, without any engine: three rounds for the coarse, middle and fine text of a chain.

The paper makes these texts in a dialogue of three rounds with Qwen2.5-VL; its prompts are not published (domain facts
2.6), so they are stated here. Each round shows the picture that its text goes with (a quarter, half and all of the
size) after everything said before, so that a text adds to the earlier ones and does not contradict them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from reward_servers.checks import check_count, check_question
from reward_servers.contract import RewardServerError
from vlcot.images import area_downscale

ROUNDS = ("coarse", "middle", "fine")
"""Fields of :class:`Captions`, in the order in which they are asked for."""

_COARSE = """\
This is a photograph at a quarter of its size. Name its main objects and the kind of scene in one plain sentence of at \
most 15 words. Say only what you can see. Answer with the sentence alone."""
_MIDDLE = """\
This is the same photograph at half its size. Describe in at most 30 words what has become visible: the parts of the \
objects, their colours and where they are. Do not repeat yourself. Answer with the description alone."""
_FINE = """\
This is the same photograph at full size. Describe in at most 60 words the textures, materials, edges and light of the \
objects you named, as a restorer would need them. Do not repeat yourself. Answer with the description alone."""


@dataclass(frozen=True)
class CaptionPrompt:
    """What the captioner is asked in each round, after the picture, and how long its answers may be.

    Attributes:
        coarse, middle, fine: the questions.
        coarse_tokens, middle_tokens, fine_tokens: longest answers; a longer one is cut after its last sentence.
    """

    coarse: str = _COARSE
    middle: str = _MIDDLE
    fine: str = _FINE
    coarse_tokens: int = 48
    middle_tokens: int = 96
    fine_tokens: int = 192

    def __post_init__(self) -> None:
        for name in ROUNDS:
            check_question(f"qwen_vl.caption_prompt.{name}", getattr(self, name))
            check_count(f"qwen_vl.caption_prompt.{name}_tokens", getattr(self, f"{name}_tokens"))


def shown_sizes(image: np.ndarray) -> list[Image.Image]:
    """The pictures of the three rounds, made as the chain's own targets are (:func:`area_downscale`).

    Args:
        image: uint8 [n, n, 3] RGB, n a multiple of 4.

    Raises:
        ValueError: the image is not so.
    """
    if not isinstance(image, np.ndarray) or image.ndim != 3 or image.size == 0 or image.shape[0] % 4:
        kind = f"{image.dtype} {list(image.shape)}" if isinstance(image, np.ndarray) else type(image).__name__
        raise ValueError(f"an image to caption must be uint8 [n, n, 3], n a multiple of 4, got {kind}")
    return [Image.fromarray(area_downscale(image, image.shape[0] // part)) for part in (4, 2, 1)]


def chat(prompt: CaptionPrompt, said: Sequence[str]) -> list[dict[str, Any]]:
    """Messages of round ``len(said)``, 0 to 2: every round before with its answer in ``said``, then the question."""
    messages: list[dict[str, Any]] = []
    for number in range(len(said) + 1):
        question = getattr(prompt, ROUNDS[number])
        messages.append({"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]})
        if number < len(said):
            messages.append({"role": "assistant", "content": [{"type": "text", "text": said[number]}]})
    return messages


def caption_text(answer: str, complete: bool) -> str:
    """An answer as one line; one that is not ``complete`` ends after its last whole sentence, else its last whole word.

    Raises:
        RewardServerError: nothing is left.
    """
    line = " ".join(answer.split())
    if not complete:
        end = max(line.rfind(mark + " ") for mark in ".!?")
        ends_here = line.endswith((".", "!", "?"))
        line = line if ends_here else line[: end + 1] if end >= 0 else line.rpartition(" ")[0] or line
    if not line:
        raise RewardServerError("the captioner's answer is empty")
    return line
