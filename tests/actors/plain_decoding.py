"""What `Decoding` means, written down plainly: no cache, no batch, float64, the formulas of domain facts one by one."""

from __future__ import annotations

import math

import numpy as np
import torch
from scipy import stats

from actors.decoding import Decoding
from vlcot.grammar import ChainState, Support


@torch.no_grad()
def logits_of(model, ids) -> np.ndarray:
    """float64 [len(ids), vocabulary]: after each id."""
    return model(torch.tensor([list(map(int, ids))]), use_cache=False).logits[0].double().numpy()


def distribution(conditional, unconditional, allowed, kind: Support, decoding: Decoding) -> np.ndarray:
    """float64 [vocabulary]: probabilities of the next id; ``unconditional`` is None in text."""
    scores = conditional
    if kind is Support.CODE and unconditional is not None:
        scores = unconditional + decoding.guidance * (conditional - unconditional)
    scores = scores[allowed]
    k = len(allowed)
    if kind is Support.CODE and decoding.image_top_k is not None:
        rule, p = decoding.image_top_k, softmax(scores)
        entropy = min(max(-sum(x * math.log(x) for x in p if x > 0), 0.0), rule.max_entropy)
        k = round(rule.smallest + (rule.largest - rule.smallest) / (1 + math.exp(rule.midpoint - entropy)))
    elif kind is not Support.CODE and decoding.text_top_k is not None:
        k = decoding.text_top_k
    kept = sorted(range(len(allowed)), key=lambda i: -scores[i])[:k]
    full = np.zeros(len(conditional))
    full[allowed[kept]] = softmax(scores[kept] / decoding.temperature)
    return full


def softmax(scores: np.ndarray) -> np.ndarray:
    powers = np.exp(scores - scores.max())
    return powers / powers.sum()


def logprobs(model, family, prompt, ids, decoding: Decoding) -> np.ndarray:
    """float64 [len(ids)]: log-prob of each id after those before it; -inf where the id may not come."""
    ids = [int(i) for i in ids]
    conditional = logits_of(model, [*prompt.ids, *ids])[len(prompt.ids) - 1 :]
    unconditional, state, found = {}, ChainState(family.grammar), []
    for position, token in enumerate(ids):
        kind, _ = state.next()
        if kind is Support.FORCED:
            found.append(0.0)
        else:
            allowed = family.grammar.support_ids(kind)
            p = distribution(conditional[position], unconditional.get(position), allowed, kind, decoding)
            with np.errstate(divide="ignore"):
                found.append(np.log(p[token]))
        if token == family.vocabulary.image_start and decoding.guidance != 1:
            rest = ids[position : position + len(family.grammar.blocks[state.images]) + 1]
            unconditional = dict(enumerate(logits_of(model, rest), position + 1))
        state.advance(token)
    return np.array(found)


def p_value(drawn: list[int], probabilities: np.ndarray) -> float:
    """Chi-square of ids drawn under ``probabilities``, rare ids in one bin; 0 if an impossible id was drawn."""
    counts = np.bincount(drawn, minlength=len(probabilities))
    if counts[probabilities == 0].any():
        return 0.0
    common = probabilities * len(drawn) >= 5
    observed = np.array([*counts[common], counts[~common].sum()])
    expected = np.array([*probabilities[common], probabilities[~common].sum()]) * len(drawn)
    used = expected > 0
    return float(stats.chisquare(observed[used], expected[used]).pvalue)
