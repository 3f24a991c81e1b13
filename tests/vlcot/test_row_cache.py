"""Rows at their own positions against whole forward passes."""

from __future__ import annotations

import pytest
import torch

from vlcot.policy.config import VlcotConfig
from vlcot.policy.model import VlcotForCausalLM
from vlcot.policy.row_cache import NextIds, RowCache

pytestmark = pytest.mark.unit


@pytest.fixture(scope="module", params=[4, 2], ids=["as many key heads", "half as many"])
def model(request):
    torch.manual_seed(0)
    config = VlcotConfig(
        vocab_size=50,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=request.param,
        max_position_embeddings=64,
    )
    return VlcotForCausalLM(config).eval()


@torch.no_grad()
def test_rows_of_two_caches_read_on_whatever_the_others_do(model):
    """Three rows and two twins get ids at random, are emptied, dropped and reordered; each is as if it were alone."""
    generator = torch.Generator().manual_seed(1)
    own, twins = (
        RowCache(model.config, 3, 40, model.lm_head.weight),
        RowCache(model.config, 2, 40, model.lm_head.weight),
    )
    read: dict[RowCache, list[list[int]]] = {own: [[], [], []], twins: [[], []]}
    compared = 0
    for step in range(24):
        if step == 9:
            twins.restart([1])
            read[twins][1] = []
        if step == 15:
            own.keep([2, 0])
            read[own] = [read[own][2], read[own][0]]
        parts = []
        for cache, rows in read.items():
            chosen = [row for row in range(len(rows)) if torch.rand(1, generator=generator) < 0.7]
            parts.append((cache, chosen))
        owners = [read[cache][row] for cache, rows in parts for row in rows]
        if not owners:
            continue
        ids = torch.randint(50, (len(owners),), generator=generator)
        hidden = model.next_hidden(ids, NextIds(parts))
        for row, token, state in zip(owners, ids.tolist(), hidden, strict=True):
            row.append(token)
            whole = model.model(torch.tensor([row]), use_cache=False).last_hidden_state[0, -1]
            torch.testing.assert_close(state, whole, atol=1e-5, rtol=1e-5)
            compared += 1
    assert compared > 40
