"""Ids of the families: Chameleon's published names, read from a synthetic token table of the 7B."""

from __future__ import annotations

import numpy as np
import pytest

from tests.families import byte_tokenizer
from vlcot.tokenizer.text import TextTokenizer
from vlcot.vocabulary import Vocabulary, code_name, grid_name

pytestmark = pytest.mark.unit

CODES_7B = 16384


@pytest.fixture(scope="module")
def table_7b() -> dict[str, int]:
    """PURE's ids (domain.md 2.2, 2.3): 65,536 of Chameleon, and 8,192 more codes behind them."""
    table = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "<eoss>": 8196, "<racm3:break>": 8197}
    table |= {f"<reserved{n:05d}>": n + 4 for n in range(8194, 8865)}
    table |= {code_name(c): c + 4 if c < 8192 else c + 57344 for c in range(CODES_7B)}
    return table | {f"word{i}": i for i in range(8869, 65536)}


@pytest.fixture(scope="module")
def vocabulary_7b(table_7b: dict[str, int]) -> Vocabulary:
    return Vocabulary.from_token_table(table_7b, size=73728)


def test_7b_special_ids_are_the_published_ones(vocabulary_7b: Vocabulary) -> None:
    v = vocabulary_7b
    assert (v.bos, v.pad, v.eos, v.image_end, v.image_start, v.turn_end, v.new_line) == (
        0,
        1,
        2,
        8196,
        8197,
        8710,
        8803,
    )
    assert v.size == 73728


def test_7b_grid_ids_are_8804_plus_units(vocabulary_7b: Vocabulary) -> None:
    assert all(vocabulary_7b.grid_ids[n] == 8804 + n for n in range(1, 61))
    assert [vocabulary_7b.grid_ids[n] for n in (4, 8, 16)] == [8808, 8812, 8820]
    assert vocabulary_7b.units_of_id[8820] == 16


def test_7b_codes_are_a_bijection_onto_both_ranges(vocabulary_7b: Vocabulary) -> None:
    ids = vocabulary_7b.image_ids
    assert len(ids) == CODES_7B
    assert sorted(ids.tolist()) == [*range(4, 8196), *range(65536, 73728)]
    assert np.array_equal(vocabulary_7b.code_of_id[ids], np.arange(CODES_7B))
    assert (vocabulary_7b.code_of_id >= 0).sum() == CODES_7B


def test_7b_text_support_is_text_turn_end_and_image_start(vocabulary_7b: Vocabulary) -> None:
    v = vocabulary_7b
    words = list(range(8869, 65536))
    assert v.text_support(image_may_start=True).tolist() == sorted([8197, 8710, *words])
    assert v.text_support(image_may_start=False).tolist() == sorted([8710, *words])
    assert not v.is_text[[0, 1, 2, 3, 4, 8196, 8197, 8710, 8803, 8808, 70000]].any()


def test_code_names_write_digits_as_letters() -> None:
    assert [code_name(c) for c in (0, 9, 10, 16383)] == ["IMGIMGAZ", "IMGIMGJZ", "IMGIMGBAZ", "IMGIMGBGDIDZ"]
    assert grid_name(4) == "<reserved08804>"


def test_a_table_without_a_special_token_is_refused_by_name(table_7b: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="<eoss>"):
        Vocabulary.from_token_table({name: i for name, i in table_7b.items() if name != "<eoss>"})


def test_a_gap_or_a_double_id_among_the_codes_is_refused(table_7b: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="once each"):
        Vocabulary.from_token_table({name: i for name, i in table_7b.items() if name != code_name(7)})
    with pytest.raises(ValueError, match="once each"):
        Vocabulary.from_token_table({**table_7b, code_name(7): table_7b[code_name(8)]})


def test_ids_beyond_the_embedding_are_refused(table_7b: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="65536 embedding rows"):
        Vocabulary.from_token_table(table_7b, size=65536)


def test_text_that_spells_a_special_token_stays_text() -> None:
    text = TextTokenizer(byte_tokenizer())
    flags = text.vocabulary().is_text
    for spelled in ("<eoss>", "<racm3:break>", "<s>", "IMGIMGAZ", "<reserved08706>"):
        ids = text.encode(f"a {spelled} b")
        assert flags[ids].all() and text.decode(ids) == f"a {spelled} b"
