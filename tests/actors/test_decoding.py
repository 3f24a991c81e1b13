"""Guidance, entropy and top-k as tensor functions, and the settings that are refused."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from scipy import stats

from actors.decoding import EXTRA_ARG, PURE, Decoding, EntropyTopK, entropy, guided, keep_top, truncate
from actors.paired_rows import draw
from vlcot.grammar import Support

pytestmark = pytest.mark.unit
NEVER = float("-inf")


def test_k_follows_the_entropy_as_in_pures_code():
    """Values of PURE's ``inference_solver.py`` at these entropies (nats), computed once with the authors' formula."""
    table = {0: 14, 1: 37, 2: 96, 3: 239, 4: 539, 5: 1000, 6: 1462, 7: 1762, 8: 1905, math.log(16384): 1982, 10: 1987}
    k = EntropyTopK().k(torch.tensor([*table, 50.0]))
    assert k.tolist() == [*table.values(), 1987]  # the entropy counts up to 10
    assert EntropyTopK(3, 3).k(torch.tensor([0.0, 9.0])).tolist() == [3, 3]


def test_guidance_moves_from_the_unconditional_logits():
    c, u = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 4.0]])
    assert guided(c, u, 0.8).tolist() == [pytest.approx([0.8, 2.4])]
    assert guided(c, u, 3.0).tolist() == [[3.0, -2.0]]
    assert torch.equal(guided(c, u, 1.0), c) and torch.equal(guided(c, u, 0.0), u)


def test_entropy_is_scipys_and_forbidden_ids_add_nothing():
    logits = torch.from_numpy(np.random.default_rng(0).normal(0, 3, (5, 40))).float()
    logits[:, ::3] = NEVER
    expected = stats.entropy(logits.double().softmax(-1).numpy(), axis=1)
    assert entropy(logits).numpy() == pytest.approx(expected, abs=1e-5)
    assert entropy(torch.tensor([[0.0, NEVER]])).item() == 0


def test_top_k_keeps_the_largest_of_each_row_by_its_own_k():
    logits = torch.from_numpy(np.random.default_rng(1).permutation(60).reshape(4, 15)).float()
    logits[3, 5:] = NEVER
    before, k = logits.clone(), torch.tensor([1, 4, 99, 7])
    kept = torch.isfinite(keep_top(logits, k))
    assert kept.sum(1).tolist() == [1, 4, 15, 5]  # a k beyond what there is keeps all of it
    for row, own in enumerate(kept[:2]):
        assert set(before[row][own].tolist()) == set(before[row].sort().values[-int(k[row]) :].tolist())
    assert torch.equal(logits[kept], before[kept])
    assert keep_top(torch.tensor([[2.0, 1.0, 1.0, 0.0]]), torch.tensor([2])).isfinite().tolist() == [
        [True] * 3 + [False]
    ]


def test_a_sharp_row_keeps_fewer_ids_than_a_flat_one():
    logits = torch.stack([torch.linspace(0, 1, 5000), torch.linspace(0, 30000, 5000)])
    kept = truncate(logits.clone(), EntropyTopK()).isfinite().sum(1).tolist()
    assert kept == EntropyTopK().k(entropy(logits)).tolist() and kept[0] > 1900 and kept[1] < 40
    assert torch.equal(truncate(logits.clone(), None), logits)


def test_draws_follow_the_distribution_and_the_noise_alone():
    p = np.array([0.0, 0.5, 0.0, 0.2, 0.3, 0.0])
    logprobs = torch.from_numpy(p).log().float().expand(4000, -1)
    noise = np.random.default_rng(2).random(4000)
    counts = np.bincount(draw(logprobs, noise).numpy(), minlength=6)
    assert counts[p == 0].sum() == 0
    assert stats.chisquare(counts[p > 0], p[p > 0] * 4000).pvalue > 1e-3
    assert draw(logprobs[:4], [0.0, 0.499, 0.501, 1 - 1e-12]).tolist() == [1, 1, 3, 4]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"temperature": float("nan")}, "temperature must be positive"),
        ({"guidance": -0.1}, "guidance must be 0 or more"),
        ({"guidance": float("inf")}, "guidance must be 0 or more"),
        ({"text_top_k": 0}, "top-k must be whole and from 1 up"),
        ({"text_top_k": 1.5}, "top-k must be whole and from 1 up"),
    ],
)
def test_settings_without_meaning_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Decoding(**settings)


@pytest.mark.parametrize("rule", [{"smallest": 0}, {"smallest": 9, "largest": 8}, {"midpoint": float("nan")}])
def test_rules_without_meaning_are_refused(rule):
    with pytest.raises(ValueError, match="top-k"):
        EntropyTopK(**rule)


def test_settings_survive_the_way_to_vllm():
    for decoding in (PURE, Decoding(text_top_k=3), Decoding(image_top_k=EntropyTopK(2, 7))):
        sent = json.loads(json.dumps(decoding.extra_args()))
        arrived = Decoding.from_extra_args(sent)
        for support in Support:
            assert arrived.top_k(support) == decoding.top_k(support)
    assert Decoding(0.7).extra_args() is None and Decoding.from_extra_args(None) is None
    with pytest.raises(ValueError, match=EXTRA_ARG):
        Decoding.from_extra_args({EXTRA_ARG: {"image_top_k": {"largest": 3, "colour": 1}, "text_top_k": 1}})
    with pytest.raises(ValueError, match=EXTRA_ARG):
        Decoding.from_extra_args({EXTRA_ARG: 5})
