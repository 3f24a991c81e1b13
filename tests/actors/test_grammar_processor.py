"""The logits processor against ChainState, without an engine: random ids, batch moves, preemption."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate, MoveDirectionality

from actors.decoding import EXTRA_ARG, Decoding, EntropyTopK
from actors.support_masks import SupportMasks
from actors.vllm_plugin.grammar_processor import GrammarProcessor
from tests.families import random_policy
from vlcot.grammar import ChainState, Support

pytestmark = pytest.mark.unit


@pytest.fixture(scope="module")
def family_directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("family")
    return random_policy(directory), str(directory)


def processor_of(directory):
    config = SimpleNamespace(model_config=SimpleNamespace(model=directory))
    return GrammarProcessor(config, torch.device("cpu"), False)


def expected_mask(grammar, tokens):
    """bool [vocabulary] by asking ChainState about every id."""
    state = ChainState(grammar)
    for token in tokens:
        state.advance(token)
    return np.array([state.allows(token) for token in range(grammar.vocabulary.size)])


def allowed_by(processor, rows, size):
    return torch.isfinite(processor.apply(torch.randn(rows, size))).numpy()


def update(processor, removed=(), added=(), moved=()):
    params = SamplingParams(temperature=1.0)
    entries = [(index, params, [1, 2], tokens) for index, tokens in added]
    processor.update_state(BatchUpdate(batch_size=0, removed=removed, added=entries, moved=moved))


def test_pitfall_18_every_row_is_masked_as_the_grammar_says(family_directory):
    """Random chains of random lengths, written step by step through removals, additions, moves and swaps."""
    family, directory = family_directory
    grammar, size = family.grammar, family.vocabulary.size
    rng = np.random.default_rng(0)
    processor = processor_of(directory)
    batch: list[list[int]] = []
    seen = set()
    for step in range(250):
        removed, added, moved = [], [], []
        if len(batch) > 2 and rng.random() < 0.1:  # the last row fills the gap, as vLLM condenses
            gone = int(rng.integers(len(batch) - 1))
            removed.append(gone)
            moved.append((len(batch) - 1, gone, MoveDirectionality.UNIDIRECTIONAL))
            batch[gone] = batch.pop()
        if len(batch) > 1 and not moved and rng.random() < 0.1:
            a, b = (int(i) for i in rng.choice(len(batch), 2, replace=False))
            moved.append((a, b, MoveDirectionality.SWAP))
            batch[a], batch[b] = batch[b], batch[a]
        if len(batch) < 6 and not moved and (step < 2 or rng.random() < 0.2):
            batch.append([])
            added.append((len(batch) - 1, batch[-1]))
        if len(batch) > 1 and not moved and not added and rng.random() < 0.1:  # preempted, resumed with a new list
            row = int(rng.integers(len(batch)))
            batch[row] = list(batch[row])
            added.append((row, batch[row]))
        update(processor, removed, added, moved)
        allowed = allowed_by(processor, len(batch), size)
        for tokens, mask in zip(batch, allowed, strict=True):
            assert np.array_equal(mask, expected_mask(grammar, tokens))
            choices = np.flatnonzero(mask)
            start = family.vocabulary.image_start
            token = start if mask[start] and rng.random() < 0.3 else int(rng.choice(choices))
            seen.add(len(choices))
            tokens.append(token)
    assert len(seen) == len(Support)  # 1, codes, text with and without an image


def test_top_k_cuts_the_requests_that_ask_for_it_and_no_others(family_directory):
    """Text and image rows, cut and plain, one of them moved; plain rows keep their bits."""
    family, directory = family_directory
    processor, size = processor_of(directory), family.vocabulary.size
    image = [family.vocabulary.image_start, *family.grammar.blocks[0][:2]]
    decoding = Decoding(image_top_k=EntropyTopK(7, 7), text_top_k=3)
    cut = SamplingParams(temperature=1.0, extra_args=decoding.extra_args())
    plain = SamplingParams(temperature=1.0)
    rows = [(0, cut, [1], []), (1, plain, [1], []), (2, cut, [1], image), (3, plain, [1], image), (4, cut, [1], image)]
    processor.update_state(BatchUpdate(batch_size=5, removed=[], added=rows, moved=[]))
    logits = torch.randn(5, size, generator=torch.Generator().manual_seed(0))
    output = processor.apply(logits.clone())
    assert output.isfinite().sum(1).tolist() == [3, len(family.grammar.support_ids(Support.TEXT)), 7, 64, 7]
    masked = SupportMasks(family.grammar).apply(logits.clone(), [processor._chains[i].state() for i in range(5)])
    for row in (1, 3):
        assert torch.equal(output[row], masked[row])
    for row, k in ((0, 3), (2, 7), (4, 7)):
        assert torch.equal(output[row].sort().values[-k:], masked[row].sort().values[-k:])
    moves = [(4, 1, MoveDirectionality.UNIDIRECTIONAL)]
    processor.update_state(BatchUpdate(batch_size=4, removed=[1], added=[], moved=moves))
    assert processor.apply(logits[:4].clone()).isfinite().sum(1).tolist() == [3, 7, 7, 64]


def test_an_id_outside_the_support_does_not_derail_the_processor(family_directory):
    family, directory = family_directory
    processor, tokens = processor_of(directory), []
    update(processor, added=[(0, tokens)])
    rng = np.random.default_rng(1)
    for _ in range(160):
        assert np.array_equal(
            allowed_by(processor, 1, family.vocabulary.size)[0], expected_mask(family.grammar, tokens)
        )
        tokens.append(int(rng.integers(family.vocabulary.size)))


def test_a_shortened_list_is_read_again(family_directory):
    family, directory = family_directory
    start = family.vocabulary.image_start
    processor, tokens = processor_of(directory), [start, *family.grammar.blocks[0][:2]]
    update(processor, added=[(0, tokens)])
    allowed_by(processor, 1, family.vocabulary.size)
    del tokens[1:]
    assert np.array_equal(allowed_by(processor, 1, family.vocabulary.size)[0], expected_mask(family.grammar, tokens))


def test_a_placeholder_id_is_an_error(family_directory):
    family, directory = family_directory
    processor = processor_of(directory)
    update(processor, added=[(0, [-1])])
    with pytest.raises(RuntimeError, match="before the last one is known"):
        processor.apply(torch.zeros(1, family.vocabulary.size))


def test_masks_refuse_other_shapes(family_directory):
    family, _ = family_directory
    masks = SupportMasks(family.grammar)
    with pytest.raises(ValueError, match="do not fit 1 chains"):
        masks.apply(torch.zeros(2, family.vocabulary.size), [ChainState(family.grammar)])


@pytest.mark.parametrize(
    ("name", "value"),
    [("temperature", 0.0), ("top_p", 0.9), ("top_k", 5), ("min_p", 0.1), ("repetition_penalty", 1.1)],
)
def test_pitfall_16_truncation_and_penalties_are_refused(name, value):
    with pytest.raises(ValueError, match=name):
        GrammarProcessor.validate_params(SamplingParams(**{"temperature": 1.0, name: value}))
    GrammarProcessor.validate_params(SamplingParams(temperature=0.9))
    with pytest.raises(ValueError, match=EXTRA_ARG):
        GrammarProcessor.validate_params(SamplingParams(temperature=1.0, extra_args={EXTRA_ARG: {"text_top_k": 0}}))
