"""Log-probs of the policy: the head over allowed ids, and chains that share a prompt, against plain torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.families import random_policy
from vlcot.grammar import CHOICES, Support
from vlcot.policy import logprobs as head
from vlcot.policy.attention import SharedPrompts, joined_keys, merged_parts
from vlcot.policy.config import VlcotConfig
from vlcot.policy.family import Family
from vlcot.policy.logprobs import SupportTable, support_logprobs
from vlcot.policy.model import VlcotForCausalLM

pytestmark = pytest.mark.unit


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return random_policy(tmp_path_factory.mktemp("policy") / "policy")


def random_ids(family: Family, shape: tuple[int, int], seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and supports; a quarter is FORCED."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, family.vocabulary.size, shape)
    supports = np.zeros(shape, np.uint8)
    for place in np.ndindex(shape):
        if rng.random() < 0.75:
            kind = CHOICES[rng.integers(len(CHOICES))]
            supports[place] = int(kind)
            ids[place] = rng.choice(family.grammar.support_ids(kind))
    return torch.from_numpy(ids), torch.from_numpy(supports)


def masked_logprobs(hidden, weight, family, ids, supports, temperature) -> torch.Tensor:
    """The definition, over the whole vocabulary."""
    logits = hidden @ weight.T / temperature
    for kind in CHOICES:
        forbidden = torch.ones(family.vocabulary.size, dtype=torch.bool)
        forbidden[torch.from_numpy(family.grammar.support_ids(kind))] = False
        logits = logits.masked_fill((supports == int(kind))[:, None] & forbidden, float("-inf"))
    chosen = logits.log_softmax(1).gather(1, ids[:, None]).squeeze(1)
    return torch.where(supports == int(Support.FORCED), 0.0, chosen)


@pytest.mark.parametrize("chunk", [3, 512])
@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_head_equals_a_masked_softmax_in_value_and_gradient(family, monkeypatch, chunk, temperature) -> None:
    monkeypatch.setattr(head, "CHUNK_TOKENS", chunk)
    ids, supports = (x.flatten() for x in random_ids(family, (5, 13), 0))
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(65, 24, generator=generator)
    weight = torch.randn(family.vocabulary.size, 24, generator=generator)
    upstream = torch.randn(65, generator=generator)
    found = [x.clone().requires_grad_() for x in (hidden, weight)]
    exact = [x.double().requires_grad_() for x in (hidden, weight)]
    logprobs = support_logprobs(*found, SupportTable.of(family.grammar), ids, supports, temperature)
    wanted = masked_logprobs(*exact, family, ids, supports, temperature)
    assert logprobs.dtype == torch.float32
    torch.testing.assert_close(logprobs.double(), wanted, rtol=0, atol=1e-5)
    (logprobs * upstream).sum().backward()
    (wanted * upstream).sum().backward()
    for ours, theirs in zip(found, exact, strict=True):
        assert (ours.grad - theirs.grad).norm() <= 1e-6 * theirs.grad.norm()


def test_bfloat16_head_keeps_the_sum_of_chunks_in_float32(family, monkeypatch) -> None:
    """Many chunks lose no more of the weight's gradient than one does."""
    ids, supports = (x.flatten() for x in random_ids(family, (8, 64), 2))
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(512, 24, generator=generator).bfloat16()
    weight = torch.randn(family.vocabulary.size, 24, generator=generator).bfloat16()
    errors = {}
    exact = weight.double().requires_grad_()
    masked_logprobs(hidden.double(), exact, family, ids, supports, 1.0).sum().backward()
    for chunk in (8, 512):
        monkeypatch.setattr(head, "CHUNK_TOKENS", chunk)
        found = weight.clone().requires_grad_()
        support_logprobs(hidden, found, SupportTable.of(family.grammar), ids, supports, 1.0).sum().backward()
        assert found.grad.dtype == torch.bfloat16
        errors[chunk] = float((found.grad.double() - exact.grad).norm() / exact.grad.norm())
    assert errors[8] < 1.1 * errors[512] < 0.02, errors


def test_ids_outside_their_support_are_refused(family) -> None:
    table = SupportTable.of(family.grammar)
    hidden, weight = torch.zeros(1, 4), torch.zeros(family.vocabulary.size, 4)
    code, text = torch.tensor([int(family.vocabulary.image_ids[0])]), torch.tensor([int(Support.TEXT)])
    with pytest.raises(ValueError, match="outside of support TEXT"):
        support_logprobs(hidden, weight, table, code, text, 1.0)
    with pytest.raises(ValueError, match="temperature"):
        support_logprobs(hidden, weight, table, code, text, 0.0)


@pytest.mark.parametrize("key_heads", [1, 2, 4])
def test_shared_prompts_equal_whole_sequences_in_value_and_gradient(family, key_heads) -> None:
    """Prompts of 9 ids with 3, 1 and 2 chains of up to 23: as if each chain had its own prompt."""
    torch.manual_seed(0)
    config = VlcotConfig(
        vocab_size=family.vocabulary.size,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=key_heads,
        max_position_embeddings=64,
    )
    model = VlcotForCausalLM(config)
    counts = (3, 1, 2)
    table = SupportTable.of(family.grammar)
    prompts, _ = random_ids(family, (3, 9), 4)
    ids, supports = random_ids(family, (6, 23), 5)
    for row, length in enumerate((23, 20, 1, 7, 23, 2)):
        supports[row, length:] = int(Support.FORCED)
    upstream = torch.randn(6, 23, generator=torch.Generator().manual_seed(6))

    shared = model.chain_logprobs(prompts, ids, supports, counts, table, 0.9)
    (shared * upstream).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    repeated = prompts.repeat_interleave(torch.tensor(counts), 0)
    whole = torch.cat([repeated, ids], 1), torch.cat([torch.zeros_like(repeated, dtype=torch.uint8), supports], 1)
    plain = model.token_logprobs(whole[0], table, whole[1], 0.9)[:, 9:]
    (plain * upstream).sum().backward()

    torch.testing.assert_close(shared, plain, rtol=0, atol=1e-5)
    for name, parameter in model.named_parameters():
        assert (gradients[name] - parameter.grad).norm() <= 1e-5 * parameter.grad.norm(), name


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    counts=st.lists(st.integers(1, 3), min_size=1, max_size=3),
    prompt=st.integers(1, 17),
    chain=st.integers(1, 17),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_both_ways_to_attend_give_the_same(counts, prompt, chain, dtype) -> None:
    """The way of CUDA (keys joined) and of the CPU (parts merged), in value and gradient."""
    generator = torch.Generator().manual_seed(0)
    batch = SharedPrompts(tuple(counts), prompt, chain)
    shapes = [(sum(counts), 2, chain, 16)] * 3 + [(len(counts), 2, prompt, 16)] * 2
    inputs = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    upstream = torch.randn(shapes[0], generator=generator).to(dtype)
    found = []
    for way in (joined_keys, merged_parts):
        tensors = [x.clone().requires_grad_() for x in inputs]
        out = way(*tensors, batch, 0.25)
        out.backward(upstream)
        found.append([out.detach(), *(x.grad for x in tensors)])
    for joined, merged in zip(*found, strict=True):
        assert (joined - merged).norm() <= (1e-5 if dtype == torch.float32 else 0.02) * joined.norm() + 1e-6
