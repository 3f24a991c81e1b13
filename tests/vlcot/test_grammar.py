"""The grammar: what may come where, for sampler, learner and parser alike."""

from __future__ import annotations

import numpy as np
import pytest

from tests.families import LAYOUT, byte_tokenizer
from vlcot.grammar import ChainState, Grammar, Support
from vlcot.sequence import image_block
from vlcot.tokenizer.text import TextTokenizer
from vlcot.vocabulary import Vocabulary

pytestmark = pytest.mark.unit


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return TextTokenizer(byte_tokenizer()).vocabulary()


@pytest.fixture(scope="module")
def grammar(vocabulary: Vocabulary) -> Grammar:
    return LAYOUT.grammar(vocabulary)


def walk(grammar: Grammar, ids: list[int]) -> ChainState:
    state = ChainState(grammar)
    for token in ids:
        state.advance(token)
    return state


def block(grammar: Grammar, side: int, code: int = 0) -> list[int]:
    return image_block(grammar.vocabulary, np.full((side, side), code), grammar.grid_unit)


def test_grids_are_a_quarter_half_and_full(grammar: Grammar) -> None:
    assert grammar.grids == ((2, 2), (4, 4), (8, 8))


def test_text_support_holds_text_turn_end_and_image_start_only(grammar: Grammar) -> None:
    """pitfall 18: no image ids in text."""
    v = grammar.vocabulary
    assert grammar.support_ids(Support.TEXT).tolist() == sorted([*v.text_ids.tolist(), v.turn_end, v.image_start])
    assert grammar.support_ids(Support.LAST_TEXT).tolist() == sorted([*v.text_ids.tolist(), v.turn_end])


def test_code_support_is_the_codebook(grammar: Grammar) -> None:
    """pitfall 18: no text ids in an image."""
    assert grammar.support_ids(Support.CODE).tolist() == sorted(grammar.vocabulary.image_ids.tolist())


def test_forced_has_no_fixed_set(grammar: Grammar) -> None:
    with pytest.raises(ValueError, match="FORCED"):
        grammar.support_ids(Support.FORCED)


def test_an_image_block_forces_all_but_its_codes(grammar: Grammar) -> None:
    v = grammar.vocabulary
    state = walk(grammar, [v.image_start])
    seen = []
    for token in block(grammar, 2, code=5)[1:]:
        support, forced = state.next()
        seen.append((support, forced))
        assert state.allows(token)
        state.advance(token)
    line = [(Support.CODE, -1), (Support.CODE, -1), (Support.FORCED, v.new_line)]
    unit = (Support.FORCED, v.grid_ids[1])
    assert seen == [unit, unit, *line, *line, (Support.FORCED, v.image_end)]
    assert state.next() == (Support.TEXT, -1) and state.images == 1


def test_after_the_last_image_no_other_may_start(grammar: Grammar) -> None:
    v = grammar.vocabulary
    state = walk(grammar, [*block(grammar, 2), *block(grammar, 4), *block(grammar, 8)])
    assert state.next()[0] is Support.LAST_TEXT
    assert not state.allows(v.image_start) and state.allows(v.turn_end)


def test_turn_end_finishes_and_then_only_padding_follows(grammar: Grammar) -> None:
    v = grammar.vocabulary
    state = walk(grammar, [v.turn_end])
    assert state.finished and state.next() == (Support.FORCED, v.pad)
    state.advance(int(v.text_ids[0]))
    assert state.finished and state.allows(v.pad) and not state.allows(int(v.text_ids[0]))


def test_ids_outside_of_the_support_are_not_allowed(grammar: Grammar) -> None:
    v = grammar.vocabulary
    code, text = int(v.image_ids[0]), int(v.text_ids[0])
    for refused in (-1, v.size, code, v.bos, v.pad, v.eos, v.image_end, v.new_line, v.grid_ids[1]):
        assert not ChainState(grammar).allows(refused)
    in_block = walk(grammar, [v.image_start, v.grid_ids[1], v.grid_ids[1]])
    for refused in (-1, v.size, text, v.turn_end, v.image_start, v.new_line):
        assert not in_block.allows(refused)
    assert in_block.allows(code)


def test_supports_labels_every_position(grammar: Grammar) -> None:
    v = grammar.vocabulary
    text = int(v.text_ids[3])
    ids = [text, *block(grammar, 2), text, *block(grammar, 4), *block(grammar, 8), text, v.turn_end]
    kinds = grammar.supports(ids)
    assert kinds.dtype == np.uint8 and len(kinds) == len(ids)
    assert [(kinds == kind).sum() for kind in Support] == [3 * 3 + 2 + 4 + 8, 4 + 16 + 64, 2 + 3, 2]
    assert kinds[0] == Support.TEXT and kinds[1] == Support.TEXT and kinds[-1] == Support.LAST_TEXT


def test_supports_names_the_first_wrong_id_and_its_position(grammar: Grammar) -> None:
    v = grammar.vocabulary
    text = int(v.text_ids[0])
    with pytest.raises(ValueError, match=f"id {v.new_line} at position 1 is not in support TEXT"):
        grammar.supports([text, v.new_line])
    with pytest.raises(ValueError, match=f"id {v.grid_ids[2]} at position 1 is not in support FORCED"):
        grammar.supports(block(grammar, 4))
    with pytest.raises(ValueError, match="position 3 is not in support CODE"):
        grammar.supports([*block(grammar, 2)[:3], v.turn_end])


def test_a_side_without_grid_token_is_refused(vocabulary: Vocabulary) -> None:
    for grids in (((3, 2),), ((6, 6),), ((0, 2),)):
        with pytest.raises(ValueError, match="no grid tokens"):
            Grammar(vocabulary, grids, grid_unit=2)
