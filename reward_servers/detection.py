"""The rules of Grounded-SAM around its two models: prompts, labels, overlaps and what counts as a main object."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import torch

from reward_servers.checks import check_count, check_share
from reward_servers.contract import DetectedObject

DELIMITERS = ".?"
"""GroundingDINO ends a phrase at these; a name cannot hold them."""

COMMON = "common"
"""Stands for the shipped vocabulary, ``vocabularies/common_objects.txt``."""


@dataclass(frozen=True)
class MainRule:
    """Which objects are the main ones of an image.

    A name is main if one of its instances covers at least ``min_area`` of the image and scores at least
    ``min_score``; names are ordered by their largest such instance and the first ``max_count`` are kept.

    Attributes:
        min_area: share of the image that the mask covers.
        min_score: detection confidence.
        max_count: most names kept.
    """

    min_area: float = 0.04
    min_score: float = 0.3
    max_count: int = 3

    def __post_init__(self) -> None:
        for name in ("min_area", "min_score"):
            check_share(f"grounded_sam.main.{name}", getattr(self, name))
        check_count("grounded_sam.main.max_count", self.max_count)


def load_vocabulary(source: Sequence[str] | str | Path) -> tuple[str, ...]:
    """Names to look for, as :func:`clean_names` leaves them.

    Args:
        source: the names, ``common`` (:data:`COMMON`), or the path of a UTF-8 file with one name a line.

    Raises:
        ValueError: the file cannot be read, or as :func:`clean_names`.
    """
    where = "grounded_sam.vocabulary"
    if not isinstance(source, str | Path):
        return clean_names(source, where)
    path = resources.files("reward_servers") / "vocabularies/common_objects.txt" if source == COMMON else Path(source)
    try:
        return clean_names(path.read_text(encoding="utf-8").splitlines(), where)
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{where}: cannot read {source}: {error}") from error


def clean_names(names: Sequence[str], where: str) -> tuple[str, ...]:
    """Names in lower case, single spaces, without repetitions, in their order.

    Args:
        names: as given; blank ones are left out.
        where: what the names are, for the error.

    Raises:
        ValueError: no list of strings, no name is left, or a name holds a delimiter.
    """
    if isinstance(names, str) or not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{where} must be a list of names, got {names!r}")
    cleaned = tuple(dict.fromkeys(" ".join(name.lower().split()) for name in names if name.strip()))
    if not cleaned:
        raise ValueError(f"{where} holds no name")
    for name in cleaned:
        if any(mark in name for mark in DELIMITERS):
            raise ValueError(f"{where}: {name!r} holds one of {DELIMITERS!r}, which end a phrase")
    return cleaned


def prompt_text(names: Sequence[str]) -> str:
    """``a. b. c.``, as GroundingDINO wants it."""
    return ". ".join(names) + "."


def chunk_vocabulary(names: Sequence[str], tokens: Callable[[str], int], limit: int) -> list[tuple[str, ...]]:
    """Split names into prompts of at most ``limit`` tokens, in order, as few as filling them up greedily gives.

    Args:
        names: of :func:`load_vocabulary`.
        tokens: number of tokens of a name, special tokens not counted.
        limit: longest prompt, its start, its end and one full stop per name included.

    Raises:
        ValueError: a name alone is too long.
    """
    chunks: list[list[str]] = []
    room = 0
    for name in names:
        need = tokens(name) + 1
        if need > limit - 2:
            raise ValueError(f"{name!r} takes {need + 2} tokens as a prompt, the detector reads {limit}")
        if need > room:
            chunks.append([])
            room = limit - 2
        chunks[-1].append(name)
        room -= need
    return [tuple(chunk) for chunk in chunks]


def phrase_spans(ids: Sequence[int], full_stop: int) -> list[tuple[int, int]]:
    """First and past-the-end position of every phrase of a tokenised prompt ``[CLS] a . b . [SEP]``."""
    spans, start = [], 1
    for position, token in enumerate(ids):
        if token == full_stop:
            spans.append((start, position))
            start = position + 1
    return spans


def whole_phrase(
    probabilities: torch.Tensor, spans: Sequence[tuple[int, int]], box_threshold: float, text_threshold: float
) -> tuple[int, float] | None:
    """The one phrase that a query found, and its score.

    GroundingDINO joins every token above ``text_threshold`` into a phrase, which may be part of a name, parts of
    several or empty. Here the tokens vote for whole names: among the names with a token above ``text_threshold``, the
    one with the highest mean over its tokens wins, so "light" does not win a query that says "traffic light". Its
    score is its best token's, and must pass ``box_threshold``.

    Args:
        probabilities: float [T], of one query.
        spans: of :func:`phrase_spans`.

    Returns:
        Index into ``spans`` and score, None if no name passes.
    """
    named = [i for i, (start, end) in enumerate(spans) if bool((probabilities[start:end] > text_threshold).any())]
    if not named:
        return None
    best = max(named, key=lambda i: float(probabilities[slice(*spans[i])].mean()))
    score = float(probabilities[slice(*spans[best])].max())
    return (best, score) if score > box_threshold else None


def box_iou(boxes: torch.Tensor) -> torch.Tensor:
    """IoU of every pair, [N, N], of boxes x0, y0, x1, y1 [N, 4]. Two empty boxes have IoU 0."""
    low = torch.maximum(boxes[:, None, :2], boxes[None, :, :2])
    high = torch.minimum(boxes[:, None, 2:], boxes[None, :, 2:])
    overlap = (high - low).clamp(min=0).prod(-1)
    area = (boxes[:, 2:] - boxes[:, :2]).clamp(min=0).prod(-1)
    union = area[:, None] + area[None, :] - overlap
    return torch.where(union > 0, overlap / union.clamp(min=torch.finfo(boxes.dtype).tiny), 0.0)


def nms(boxes: torch.Tensor, scores: torch.Tensor, iou_threshold: float) -> list[int]:
    """Greedy non-maximum suppression over all labels, as ``torchvision.ops.nms``, whose operator a CPU build may lack.

    Args:
        boxes: float [N, 4], x0, y0, x1, y1.
        scores: float [N].
        iou_threshold: a box that overlaps a better one by more than this is dropped.

    Returns:
        Indices kept, best score first.
    """
    iou = box_iou(boxes)
    kept: list[int] = []
    for i in scores.argsort(descending=True, stable=True).tolist():
        if not kept or float(iou[i, kept].max()) <= iou_threshold:
            kept.append(i)
    return kept


def main_objects(objects: Sequence[DetectedObject], rule: MainRule) -> tuple[str, ...]:
    """Names of the main objects, largest first; see :class:`MainRule`."""
    large = [o for o in objects if o.mask_area >= rule.min_area and o.score >= rule.min_score]
    large.sort(key=lambda o: (-o.mask_area, -o.score, o.name))
    return tuple(dict.fromkeys(o.name for o in large))[: rule.max_count]
