"""The toy policy's tokenizer as it is shipped."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from toy.rows import INSTRUCTION, row
from toy.tokenizer import CODEBOOK, VOCABULARY_SIZE
from vlcot.sequence import CHAIN_TAGS
from vlcot.tokenizer.text import TextTokenizer

pytestmark = pytest.mark.unit

TEXT = TextTokenizer.from_file(Path("toy/weights/policy/tokenizer.json"))
VOCABULARY = TEXT.vocabulary(VOCABULARY_SIZE)


def test_special_ids() -> None:
    v = VOCABULARY
    assert (v.bos, v.pad, v.eos) == (0, 1, 2)
    assert v.image_ids.tolist() == list(range(4, 4 + CODEBOOK))
    assert (v.image_end, v.image_start, v.turn_end, v.new_line) == (516, 517, 518, 519)
    assert dict(v.grid_ids) == {1: 520, 2: 521, 4: 522}
    assert v.text_ids.tolist() == list(range(523, VOCABULARY_SIZE))


@given(st.text(st.characters(exclude_categories=["Cs"])))
@settings(max_examples=300, deadline=None, derandomize=True)
def test_every_text_comes_back_from_text_ids(text: str) -> None:
    ids = TEXT.encode(text)
    assert VOCABULARY.is_text[ids].all() and TEXT.decode(ids) == text


@pytest.mark.parametrize("text", ["<eoss>", "a <s> b", "IMGIMGAZ", "<reserved08706>", "<|image|>", "<racm3:break>"])
def test_text_that_spells_a_special_token_stays_text(text: str) -> None:
    ids = TEXT.encode(text)
    assert VOCABULARY.is_text[ids].all() and TEXT.decode(ids) == text


@given(st.lists(st.sampled_from(VOCABULARY.text_ids.tolist()), max_size=30))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_any_text_ids_can_be_decoded(ids: list[int]) -> None:
    assert isinstance(TEXT.decode(ids), str)


def test_each_tag_is_one_text_id() -> None:
    for tag in CHAIN_TAGS:
        for text in (f"<{tag}>", f"</{tag}>"):
            ids = TEXT.encode(text)
            assert len(ids) == 1 and VOCABULARY.is_text[ids[0]]
    assert len(TEXT.encode("</rough_image><middle_understand>a cat</middle_understand>")) == 5


def test_texts_of_the_task_are_short() -> None:
    lengths = [sum(len(TEXT.encode(text)) for text in row(i, "heldout").texts) for i in range(64)]
    assert sum(lengths) / 64 < 40 and max(lengths) < 70
    assert len(TEXT.encode(INSTRUCTION.replace("<|image|>", ""))) < 10
