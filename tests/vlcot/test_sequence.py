"""Layout, chain and parser. The parser is total: no sequence of ids makes it raise."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.families import INSTRUCTION, LAYOUT, byte_tokenizer
from vlcot.sequence import CHAIN_TAGS, IMAGE_TAGS, TEXT_TAGS, Layout, SequenceBuilder, image_block
from vlcot.tokenizer.text import TextTokenizer
from vlcot.vocabulary import Vocabulary, code_name

pytestmark = pytest.mark.unit

TEXT = TextTokenizer(byte_tokenizer())
VOCABULARY = TEXT.vocabulary()
BUILDER = SequenceBuilder(VOCABULARY, LAYOUT, TEXT.encode, TEXT.decode)
TEXTS = ("[heavy blur]", "a cat", "a tabby cat", "green eyes")
GRIDS = BUILDER.grammar.grids


def codes(seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 64, grid) for grid in GRIDS]


CODES = codes()
CHAIN = BUILDER.chain(TEXTS, CODES).tolist()


def segments() -> dict[str, list[int]]:
    """The ids of each block, tags included."""
    inner = dict(zip(TEXT_TAGS, (TEXT.encode(t) for t in TEXTS), strict=True))
    inner |= {t: image_block(VOCABULARY, c, 2) for t, c in zip(IMAGE_TAGS, CODES, strict=True)}
    return {t: [*TEXT.encode(f"<{t}>"), *inner[t], *TEXT.encode(f"</{t}>")] for t in CHAIN_TAGS}


SEGMENTS = segments()


def joined(parts: list[list[int]]) -> list[int]:
    return [i for part in parts for i in part] + [VOCABULARY.turn_end]


# layout


def test_7b_image_lengths_are_276_1060_4164_and_9664_in_all() -> None:
    """Each image is tokenised at its own size; PURE's preprocessor would make all four 4,164 ids (domain.md 0.7)."""
    layout = Layout()
    table = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "<eoss>": 8196, "<racm3:break>": 8197}
    table |= {f"<reserved{n:05d}>": n + 4 for n in range(8706, 8865)} | {code_name(c): c + 4 for c in range(8192)}
    grammar = layout.grammar(Vocabulary.from_token_table(table))
    lengths = [1 + len(block) for block in grammar.blocks]
    assert layout.image_sizes == (128, 256, 512) and lengths == [276, 1060, 4164]
    assert sum(lengths) + lengths[-1] == 9664
    ids = image_block(grammar.vocabulary, np.zeros((16, 16), dtype=np.int64), grammar.grid_unit)
    assert ids[:4] == [8197, 8808, 8808, 4] and ids[19:21] == [8803, 4] and ids[-2:] == [8803, 8196]


def test_an_impossible_layout_is_refused() -> None:
    for wrong in ({"full_size": 500}, {"grid_unit_pixels": 12}, {"full_size": 64}):
        with pytest.raises(ValueError, match="layout"):
            Layout(**wrong)


ABLATED = {
    "no degradation": tuple(t for t in CHAIN_TAGS if t != "degradation"),
    "no understanding": ("degradation", *IMAGE_TAGS),
    "two steps": CHAIN_TAGS[:1] + CHAIN_TAGS[3:],
    "one step": ("degradation", "final_understand", "final_image"),
}


@pytest.mark.parametrize("blocks", ABLATED.values(), ids=ABLATED)
def test_a_layout_without_some_blocks_has_its_own_chain_and_no_other(blocks) -> None:
    layout = replace(LAYOUT, blocks=blocks)
    builder = SequenceBuilder(VOCABULARY, layout, TEXT.encode, TEXT.decode)
    kept = [codes for codes, tag in zip(CODES, IMAGE_TAGS, strict=True) if tag in blocks]
    chain = builder.chain(TEXTS, kept).tolist()
    assert chain == joined([SEGMENTS[t] for t in blocks]) and layout.image_sizes[-1] == layout.full_size
    parsed = builder.parse(chain)
    assert parsed.well_formed and len(parsed.images) == len(kept) == len(builder.grammar.grids)
    assert parsed.texts == tuple(x if t in blocks else None for x, t in zip(TEXTS, TEXT_TAGS, strict=True))
    assert all(np.array_equal(a, b) for a, b in zip(parsed.images, kept, strict=True))
    assert not builder.parse(CHAIN).well_formed and not BUILDER.parse(chain).well_formed
    assert len(builder.grammar.supports(chain)) == len(chain)


@pytest.mark.parametrize(
    "blocks", [(), ("rough_image", "final_image"), ("middle_image",), CHAIN_TAGS[::-1], (*CHAIN_TAGS, "mood")]
)
def test_blocks_that_are_no_chain_are_refused(blocks) -> None:
    with pytest.raises(ValueError, match="layout: blocks"):
        replace(LAYOUT, blocks=blocks)


def test_height_comes_before_width() -> None:
    ids = image_block(VOCABULARY, np.zeros((4, 8), dtype=np.int64), 2)
    assert ids[1:3] == [VOCABULARY.grid_ids[2], VOCABULARY.grid_ids[4]]


def test_a_code_outside_of_the_codebook_is_refused() -> None:
    for wrong in (-1, 64):
        with pytest.raises(ValueError, match=r"0\.\.63"):
            image_block(VOCABULARY, np.full((2, 2), wrong), 2)


# prompt and chain


def test_prompt_is_bos_text_image_turn_end() -> None:
    ids = BUILDER.prompt(INSTRUCTION, CODES[2]).tolist()
    block = image_block(VOCABULARY, CODES[2], 2)
    assert ids == [VOCABULARY.bos, *TEXT.encode("restore "), *block, VOCABULARY.turn_end]


@pytest.mark.parametrize("instruction", ["restore", "<|image|> <|image|>"])
def test_an_instruction_needs_the_placeholder_once(instruction: str) -> None:
    with pytest.raises(ValueError, match="exactly once"):
        BUILDER.prompt(instruction, CODES[2])


def test_chain_holds_the_blocks_in_order() -> None:
    assert joined([SEGMENTS[t] for t in CHAIN_TAGS]) == CHAIN


def test_a_chain_that_could_not_be_read_back_is_not_written() -> None:
    for wrong in ("", "  ", "a <rough_image> b"):
        with pytest.raises(ValueError, match="free of chain tags"):
            BUILDER.chain((*TEXTS[:3], wrong), CODES)
    with pytest.raises(ValueError, match="must have"):
        BUILDER.chain(TEXTS, [CODES[1], CODES[0], CODES[2]])


plain_text = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(
    lambda t: t.strip() and "<" not in t and not set(t) & {"\ue000", "\ue001"}
)


@given(st.tuples(*[plain_text] * 4), st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_parse_reads_back_what_chain_wrote(texts: tuple[str, ...], seed: int) -> None:
    parsed = BUILDER.parse(BUILDER.chain(texts, codes(seed)))
    assert parsed.errors == () and parsed.well_formed
    assert parsed.texts == tuple(t.strip() for t in texts)
    assert all(np.array_equal(a, b) for a, b in zip(parsed.images, codes(seed), strict=True))


# the parser is total


@given(st.lists(st.integers(-3, VOCABULARY.size + 3) | st.sampled_from(CHAIN) | st.integers(), max_size=80))
@settings(max_examples=300, deadline=None, derandomize=True)
def test_random_ids_never_raise_and_are_not_well_formed(ids: list[int]) -> None:
    parsed = BUILDER.parse(ids)
    assert not parsed.well_formed and parsed.errors
    assert parsed.images == (None, None, None)


@given(st.integers(0, len(CHAIN) - 1))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_a_truncated_chain_is_not_well_formed_and_keeps_what_was_complete(length: int) -> None:
    """pitfall 20: a complete image is no truncation, a short one is."""
    parsed = BUILDER.parse(CHAIN[:length])
    assert not parsed.well_formed
    done = 0
    for i, tag in enumerate(CHAIN_TAGS):
        done += len(SEGMENTS[tag])
        if length >= done and tag in TEXT_TAGS:
            assert parsed.texts[TEXT_TAGS.index(tag)] == TEXTS[TEXT_TAGS.index(tag)]
        elif length >= done:
            assert parsed.images[IMAGE_TAGS.index(tag)] is not None
        elif tag in IMAGE_TAGS:
            assert parsed.images[IMAGE_TAGS.index(tag)] is None, (i, tag)


@given(st.lists(st.sampled_from(CHAIN_TAGS), max_size=10))
@settings(max_examples=300, deadline=None, derandomize=True)
def test_only_each_block_once_and_in_order_is_well_formed(tags: list[str]) -> None:
    assert BUILDER.parse(joined([SEGMENTS[t] for t in tags])).well_formed == (tags == list(CHAIN_TAGS))


@given(st.permutations(CHAIN_TAGS))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_swapped_blocks_are_not_well_formed(tags: list[str]) -> None:
    assert BUILDER.parse(joined([SEGMENTS[t] for t in tags])).well_formed == (tags == list(CHAIN_TAGS))


@given(st.integers(0, len(CHAIN) - 1), st.integers(-2, VOCABULARY.size + 1))
@settings(max_examples=300, deadline=None, derandomize=True)
def test_one_wrong_id_never_raises_and_is_judged_right(position: int, token: int) -> None:
    ids = [*CHAIN[:position], token, *CHAIN[position + 1 :]]
    parsed = BUILDER.parse(ids)
    if 0 <= token < VOCABULARY.size and VOCABULARY.code_of_id[CHAIN[position]] >= 0:
        assert parsed.well_formed == (VOCABULARY.code_of_id[token] >= 0)
    elif not 0 <= token < VOCABULARY.size:
        assert not parsed.well_formed


@pytest.mark.parametrize("tag", CHAIN_TAGS)
def test_a_doubled_block_is_not_well_formed_and_not_used(tag: str) -> None:
    parsed = BUILDER.parse(joined([SEGMENTS[t] for t in CHAIN_TAGS for _ in range(2 if t == tag else 1)]))
    assert not parsed.well_formed
    kept = parsed.texts[TEXT_TAGS.index(tag)] if tag in TEXT_TAGS else parsed.images[IMAGE_TAGS.index(tag)]
    assert kept is None


@pytest.mark.parametrize("tag", CHAIN_TAGS)
@pytest.mark.parametrize("filling", ["", "  ", "\n"])
def test_an_empty_block_is_not_well_formed(tag: str, filling: str) -> None:
    empty = TEXT.encode(f"<{tag}>{filling}</{tag}>")
    parsed = BUILDER.parse(joined([empty if t == tag else SEGMENTS[t] for t in CHAIN_TAGS]))
    assert not parsed.well_formed and any(tag in error for error in parsed.errors)


@pytest.mark.parametrize("outer", CHAIN_TAGS)
@pytest.mark.parametrize("inner", CHAIN_TAGS)
def test_a_nested_block_is_not_well_formed(outer: str, inner: str) -> None:
    opening = TEXT.encode(f"<{outer}>")
    parts = [SEGMENTS[t] for t in CHAIN_TAGS if t not in (outer, inner)]
    index = CHAIN_TAGS.index(outer)
    parts.insert(min(index, len(parts)), [*opening, *SEGMENTS[inner], *SEGMENTS[outer][len(opening) :]])
    assert not BUILDER.parse(joined(parts)).well_formed


@pytest.mark.parametrize("tag", IMAGE_TAGS)
@pytest.mark.parametrize("grid", [*GRIDS, (2, 4), (8, 4)])
def test_an_image_of_the_wrong_grid_is_not_used(tag: str, grid: tuple[int, int]) -> None:
    image = image_block(VOCABULARY, np.zeros(grid, dtype=np.int64), 2)
    other = [*TEXT.encode(f"<{tag}>"), *image, *TEXT.encode(f"</{tag}>")]
    parsed = BUILDER.parse(joined([other if t == tag else SEGMENTS[t] for t in CHAIN_TAGS]))
    step = IMAGE_TAGS.index(tag)
    right = grid == GRIDS[step]
    assert parsed.well_formed == right and (parsed.images[step] is not None) == right


@pytest.mark.parametrize("place", ["before", "between", "after"])
def test_text_outside_of_the_blocks_is_not_well_formed_but_white_space_is(place: str) -> None:
    for filling, right in ((" \n", True), ("well", False)):
        parts = [SEGMENTS[t] for t in CHAIN_TAGS]
        parts.insert({"before": 0, "between": 3, "after": 7}[place], TEXT.encode(filling))
        assert BUILDER.parse(joined(parts)).well_formed == right


def test_an_image_among_text_is_not_well_formed() -> None:
    image = image_block(VOCABULARY, CODES[0], 2)
    ids = [*TEXT.encode("<degradation>a"), *image, *TEXT.encode("b</degradation>")]
    parsed = BUILDER.parse(joined([ids, *(SEGMENTS[t] for t in CHAIN_TAGS[1:])]))
    assert not parsed.well_formed and parsed.degradation is None


def test_ids_after_the_end_of_the_turn_are_refused_and_not_read() -> None:
    assert BUILDER.parse([*CHAIN, VOCABULARY.turn_end]).errors == ("ids follow the end of the turn",)
    assert BUILDER.parse([VOCABULARY.turn_end, *CHAIN]).degradation is None


def test_a_model_that_writes_the_image_marks_gains_nothing() -> None:
    """The parser marks images by private characters; the model's own must not count as an image."""
    forged = TEXT.encode("<rough_image>\ue0000\ue001</rough_image>")
    parsed = BUILDER.parse(joined([forged if t == "rough_image" else SEGMENTS[t] for t in CHAIN_TAGS]))
    assert not parsed.well_formed and parsed.images[0] is None
    split_tag = TEXT.encode("<degra\ue000dation>[x]</degradation>")
    assert not BUILDER.parse(joined([split_tag, *(SEGMENTS[t] for t in CHAIN_TAGS[1:])])).well_formed


def test_a_long_run_of_stray_ids_gives_one_error() -> None:
    parsed = BUILDER.parse([VOCABULARY.new_line] * 5000)
    assert len(parsed.errors) < 12 and any("5000 ids" in error for error in parsed.errors)
