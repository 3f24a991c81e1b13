"""A chain that is followed id by id ends as the parsed one, and shows nothing on the way that is not in it."""

from __future__ import annotations

import numpy as np
import pytest

from tests.families import LAYOUT, byte_tokenizer
from vlcot.partial import PartialChain
from vlcot.policy.family import Family
from vlcot.sequence import TEXT_TAGS, Layout
from vlcot.tokenizer.text import TextTokenizer

pytestmark = pytest.mark.unit
TEXT = TextTokenizer(byte_tokenizer())
TEXTS = ("[heavy blur]", "a café, 3 < 4", "a tabby cat", "green eyes")


def family(layout: Layout = LAYOUT) -> Family:
    return Family(TEXT.vocabulary(), layout, TEXT)


def chain(of: Family) -> list[int]:
    rng = np.random.default_rng(0)
    return of.builder.chain(TEXTS, [rng.integers(0, 64, grid) for grid in of.grammar.grids]).tolist()


@pytest.mark.parametrize(
    "layout",
    [LAYOUT, Layout(64, 8, 16, ("degradation", "final_understand", "final_image"))],
    ids=["whole chain", "one step"],
)
def test_every_prefix_shows_a_part_of_the_parsed_chain(layout):
    of = family(layout)
    ids = chain(of)
    parsed = of.builder.parse(ids)
    wanted = {tag: text for tag, text in zip(TEXT_TAGS, parsed.texts, strict=True) if text is not None}
    partial, completed, drawn = PartialChain(of), [], []
    for position, token in enumerate(ids):
        if partial.take(token):
            completed.append(position)
        assert all(wanted[tag].startswith(text) for tag, text in partial.texts.items())
        drawn.append(partial.drawing)
    assert partial.texts == wanted and partial.drawing is None
    assert completed == [i for i, token in enumerate(ids) if token == of.vocabulary.image_end]
    assert all(np.array_equal(a, b) for a, b in zip(partial.images, parsed.images, strict=True))
    assert [d for d in drawn if d and d[0] == d[1]][-1] == (64, 64)


def test_an_id_that_the_grammar_does_not_allow_is_refused():
    of = family()
    partial = PartialChain(of)
    partial.take(of.vocabulary.image_start)
    with pytest.raises(ValueError, match="is not in support FORCED"):
        partial.take(of.vocabulary.turn_end)
