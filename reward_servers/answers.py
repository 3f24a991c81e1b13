"""Whether a server's answer is one: the right type, as many as were asked for, every number possible.

Each check returns the answer or raises RewardServerError; what comes from another process is believed in nothing.
"""

from __future__ import annotations

import math
from typing import Any

from reward_servers.contract import Captions, Detection, Judgement, Measurement, RewardServerError, Tags
from vlcot.rewards import EXPERT_SCALE


def detection(answer: Any) -> Detection:
    """Scores and areas in [0, 1], finite boxes; every main object is among the objects."""
    found = _typed(answer, Detection)
    for item in found.objects:
        if not (0 <= item.score <= 1 and 0 <= item.mask_area <= 1 and all(map(math.isfinite, item.box))):
            raise RewardServerError(f"an object has an impossible score, area or box: {item}")
    unseen = set(found.main) - {item.name for item in found.objects}
    if unseen:
        raise RewardServerError(f"main objects that are not among the objects: {', '.join(sorted(unseen))}")
    return found


def judgements(answer: Any, count: int) -> list[Judgement]:
    """One for each of ``count`` images, scores in [0, EXPERT_SCALE]."""
    if not isinstance(answer, list) or not all(isinstance(item, Judgement) for item in answer):
        raise RewardServerError(f"the answer is no list of Judgements but {type(answer).__name__}")
    if len(answer) != count:
        raise RewardServerError(f"{len(answer)} judgements for {count} images")
    for item in answer:
        if not all(0 <= value <= EXPERT_SCALE for value in (item.quality, item.realism, item.consistency)):
            raise RewardServerError(f"a judgement lies outside [0, {EXPERT_SCALE:g}]: {item}")
    return answer


def captions(answer: Any) -> Captions:
    """None of the three texts is blank."""
    written = _typed(answer, Captions)
    if not all(isinstance(text, str) and text.strip() for text in vars(written).values()):
        raise RewardServerError(f"a caption is empty: {written}")
    return written


def tags(answer: Any) -> Tags:
    """At least one name, none blank."""
    named = _typed(answer, Tags)
    if not named.names or not all(isinstance(name, str) and name.strip() for name in named.names):
        raise RewardServerError(f"no tags, or an empty one: {named.names}")
    return named


def measurement(answer: Any, count: int) -> Measurement:
    """At least one metric, and of each one finite value for each of ``count`` images."""
    measured = _typed(answer, Measurement)
    if not measured.values:
        raise RewardServerError("no metric was measured")
    for name, values in measured.values.items():
        if len(values) != count:
            raise RewardServerError(f"{len(values)} values of {name} for {count} images")
        if not all(map(math.isfinite, values)):
            raise RewardServerError(f"{name} is not finite: {values}")
    return measured


def shares(answer: Any, count: int) -> list[float]:
    """One number in [0, 1] for each of ``count`` images."""
    if not isinstance(answer, list | tuple) or not all(_is_number(value) for value in answer):
        raise RewardServerError(f"the answer is no list of numbers: {str(answer)[:80]}")
    if len(answer) != count:
        raise RewardServerError(f"{len(answer)} scores for {count} images")
    if not all(0.0 <= value <= 1.0 for value in answer):
        raise RewardServerError(f"a score lies outside [0, 1]: {list(answer)}")
    return [float(value) for value in answer]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _typed(answer: Any, wanted: type) -> Any:
    if not isinstance(answer, wanted):
        raise RewardServerError(f"the answer is no {wanted.__name__} but {type(answer).__name__}")
    return answer
