"""How well a visual expert's scores follow the truth on held-out crops."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from scipy.stats import spearmanr
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor

from reward_servers.contract import Judgement
from reward_servers.expert_chat import MAX_SCORE, SCORE_NAMES, chat, parse_answer, write_answer
from toy.judged_images import CORRUPTIONS, JudgedGroup, enlarge, graded_group, judged_group
from toy.qwen_vl_checkpoint import TOY_PROMPT
from vlcot.rewards import ExpertWeights

GROUP_SIZE = 8

Judge = Callable[[JudgedGroup], list[Judgement]]


@dataclass(frozen=True)
class ExpertFigures:
    """Spearman rank correlations of the weighted mean score, and mean scores (0..10) of pictures without content.

    Attributes:
        severity: with the corruption's severity, over all images (negative: worse images score lower).
        psnr: with PSNR to the ground truth, over all images.
        psnr_within: mean over groups of the correlation with PSNR inside the group.
        weak_psnr_within: the same, for images of 14 to 24 dB only.
        flat, static, other, truth: mean score of one-colour pictures, noise, other crops and the truth itself.
    """

    severity: float
    psnr: float
    psnr_within: float
    weak_psnr_within: float
    flat: float
    static: float
    other: float
    truth: float


def graded_groups(count: int) -> list[JudgedGroup]:
    """Held-out groups of `GROUP_SIZE` images, corruption kind and severity drawn uniformly."""
    rng = np.random.default_rng(20)
    names = sorted(CORRUPTIONS)
    drawn = [(tuple(rng.choice(names, GROUP_SIZE)), rng.uniform(0, 1, GROUP_SIZE)) for _ in range(count)]
    return [graded_group(i, "heldout", tuple(map(str, kinds)), levels) for i, (kinds, levels) in enumerate(drawn)]


def mixed_groups(count: int) -> list[JudgedGroup]:
    """Held-out groups made like the training groups."""
    return [judged_group(index, "heldout", GROUP_SIZE) for index in range(1000, 1000 + count)]


def weighted(judgements: list[Judgement]) -> np.ndarray:
    """Mean score of each image with the default weights of the generation reward, 0..10."""
    w = ExpertWeights()
    return np.array([w.quality * j.quality + w.realism * j.realism + w.consistency * j.consistency for j in judgements])


def expert_figures(
    graded: list[JudgedGroup], graded_scores: list[np.ndarray], mixed: list[JudgedGroup], mixed_scores: list[np.ndarray]
) -> ExpertFigures:
    """Figures from groups and the expert's weighted scores of their images."""
    scores, psnr = np.concatenate(graded_scores), np.concatenate([g.psnr for g in graded])
    kinds = np.concatenate([g.kinds for g in mixed])
    mixed_all = np.concatenate(mixed_scores)
    return ExpertFigures(
        severity=_spearman(scores, np.concatenate([g.severity for g in graded])),
        psnr=_spearman(scores, psnr),
        psnr_within=_within(graded + mixed, graded_scores + mixed_scores, (0, 60)),
        weak_psnr_within=_within(graded + mixed, graded_scores + mixed_scores, (14, 24)),
        **{kind: float(mixed_all[kinds == kind].mean()) for kind in ("flat", "static", "other", "truth")},
    )


def held_out_figures(
    model: Qwen2_5_VLForConditionalGeneration, processor: Qwen2_5_VLProcessor, groups: int
) -> ExpertFigures:
    """Figures of a model run by transformers, `groups` groups of each sort."""
    graded, mixed = graded_groups(groups), mixed_groups(groups)
    answers = [[weighted(judge(model, processor, group)) for group in sort] for sort in (graded, mixed)]
    return expert_figures(graded, answers[0], mixed, answers[1])


@torch.inference_mode()
def judge(
    model: Qwen2_5_VLForConditionalGeneration, processor: Qwen2_5_VLProcessor, group: JudgedGroup
) -> list[Judgement]:
    """Greedy answer of transformers' `generate`; as in the server, its form is forced and the scores are chosen."""
    count = len(group.images)
    prompt = processor.apply_chat_template(chat(TOY_PROMPT, count), add_generation_prompt=True, tokenize=False)
    inputs = processor(text=[prompt], images=[enlarge(group.lr), *group.images], return_tensors="pt")
    start = inputs.input_ids.shape[1]
    form = processor.tokenizer(write_answer([dict.fromkeys(SCORE_NAMES, 0)] * count)).input_ids
    scores = processor.tokenizer.convert_tokens_to_ids([str(score) for score in range(MAX_SCORE + 1)])
    allowed = [scores if token == scores[0] else [token] for token in form]
    output = model.generate(
        **inputs,
        do_sample=False,
        max_new_tokens=len(form),
        prefix_allowed_tokens_fn=lambda _, ids: allowed[len(ids) - start],
    )
    text = processor.tokenizer.decode(output[0, start:], skip_special_tokens=True)
    return parse_answer(text, count)


def _within(groups: list[JudgedGroup], scores: list[np.ndarray], window: tuple[float, float]) -> float:
    found = []
    for group, score in zip(groups, scores, strict=True):
        use = (group.psnr >= window[0]) & (group.psnr <= window[1])
        # A constant side has no rank correlation; it tells nothing apart, so it counts as none.
        if use.sum() >= 4:
            found.append(_spearman(score[use], group.psnr[use]) if np.ptp(score[use]) > 0 else 0.0)
    return float(np.mean(found))


def _spearman(a: np.ndarray, b: np.ndarray) -> float:
    return float(spearmanr(a, b)[0])
