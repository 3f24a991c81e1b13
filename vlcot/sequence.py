"""The VLCoT sequence: prompt and chain to ids, and ids back to a parsed chain.

    <s> instruction with the LR image <turn end>
    <degradation>[...]</degradation>
    <rough_understand>...</rough_understand><rough_image> IMAGE 1/4 </rough_image>
    <middle_understand>...</middle_understand><middle_image> IMAGE 1/2 </middle_image>
    <final_understand>...</final_understand><final_image> IMAGE 1/1 </final_image> <turn end>

Tags are ordinary text (RealSR-R1 ``grpo.py``; the paper says coarse/middle/fine, the code rough/middle/final).
IMAGE is ``[start, grid h, grid w, rows of (codes, new line), end]`` (Lumina-mGPT ``item_processor.py``).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from vlcot.grammar import Grammar
from vlcot.vocabulary import Vocabulary

IMAGE_PLACEHOLDER = "<|image|>"
TEXT_TAGS = ("degradation", "rough_understand", "middle_understand", "final_understand")
IMAGE_TAGS = ("rough_image", "middle_image", "final_image")
CHAIN_TAGS = (
    "degradation",
    "rough_understand",
    "rough_image",
    "middle_understand",
    "middle_image",
    "final_understand",
    "final_image",
)
ANY_TAG = re.compile(r"</?(?:" + "|".join(CHAIN_TAGS) + r")>")
"""Where any block of a chain begins or ends."""
_OPEN, _CLOSE = "\ue000", "\ue001"  # stand for image blocks in decoded text; U+FFFD where the model writes them
_MARKS = re.compile(f"[{_OPEN}{_CLOSE}]")
_IMAGE_MARK = re.compile(f"{_OPEN}([0-9]+|x){_CLOSE}")


@dataclass(frozen=True)
class Layout:
    """Image sizes of one family, and the blocks of its chain.

    Attributes:
        full_size: side of the restored image in pixels (square; PURE: 512).
        downsample: pixels per code along a side (LlamaGen VQ-8: 8).
        grid_unit_pixels: pixels that one grid token unit stands for (PURE: 32).
        blocks: tags of the chain's blocks, some of :data:`CHAIN_TAGS` in their order; the paper leaves some out in its
            ablations. The images are the last 1, 2 or 3 of the steps.
    """

    full_size: int = 512
    downsample: int = 8
    grid_unit_pixels: int = 32
    blocks: tuple[str, ...] = CHAIN_TAGS

    def __post_init__(self) -> None:
        object.__setattr__(self, "blocks", tuple(self.blocks))  # a list in config.json
        if self.blocks != tuple(tag for tag in CHAIN_TAGS if tag in self.blocks):
            raise ValueError(f"layout: blocks must be some of {', '.join(CHAIN_TAGS)}, in this order: {self.blocks}")
        images = [tag for tag in IMAGE_TAGS if tag in self.blocks]
        if not images or tuple(images) != IMAGE_TAGS[-len(images) :]:
            raise ValueError(f"layout: blocks need final_image, and middle_image with rough_image: {self.blocks}")
        if self.grid_unit_pixels % self.downsample or self.full_size % (4 * self.grid_unit_pixels):
            raise ValueError(
                f"layout: full_size {self.full_size} must be a multiple of 4 x grid_unit_pixels "
                f"{self.grid_unit_pixels}, itself a multiple of downsample {self.downsample}"
            )

    @property
    def image_sizes(self) -> tuple[int, ...]:
        """Sides of the chain's images in pixels, from coarse to final."""
        parts = {"rough_image": 4, "middle_image": 2, "final_image": 1}
        return tuple(self.full_size // part for tag, part in parts.items() if tag in self.blocks)

    def grammar(self, vocabulary: Vocabulary) -> Grammar:
        """The grammar of the answer."""
        sides = [size // self.downsample for size in self.image_sizes]
        return Grammar(vocabulary, tuple((s, s) for s in sides), self.grid_unit_pixels // self.downsample)


def image_block(vocabulary: Vocabulary, codes: np.ndarray, grid_unit: int) -> list[int]:
    """Ids of one image.

    Args:
        codes: int [rows, columns], values below the codebook size.
        grid_unit: codes per grid unit.

    Raises:
        ValueError: a side that no grid token describes, or a code outside the codebook.
    """
    rows, columns = codes.shape
    template = Grammar(vocabulary, ((rows, columns),), grid_unit).blocks[0]
    if codes.min() < 0 or codes.max() >= len(vocabulary.image_ids):
        raise ValueError(f"image codes must lie in 0..{len(vocabulary.image_ids) - 1}")
    flat = iter(vocabulary.image_ids[codes.reshape(-1)].tolist())
    return [vocabulary.image_start, *(next(flat) if i < 0 else i for i in template)]


class SequenceBuilder:
    """Builds prompts and chains of one family, and parses what a policy wrote.

    Args:
        encode: text -> ids, without special tokens.
        decode: ids -> text; must accept any sequence of text ids.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        layout: Layout,
        encode: Callable[[str], list[int]],
        decode: Callable[[list[int]], str],
    ) -> None:
        self.vocabulary = vocabulary
        self.layout = layout
        self.grammar = layout.grammar(vocabulary)
        self._text_tags = tuple(tag for tag in TEXT_TAGS if tag in layout.blocks)
        self._image_tags = tuple(tag for tag in IMAGE_TAGS if tag in layout.blocks)
        self._encode = encode
        self._decode = decode

    def prompt(self, instruction: str, lr_codes: np.ndarray) -> np.ndarray:
        """int32 ids of the question; ``<|image|>`` in the instruction is replaced by the LR image.

        Raises:
            ValueError: the instruction does not hold the placeholder exactly once.
        """
        pieces = instruction.split(IMAGE_PLACEHOLDER)
        if len(pieces) != 2:
            raise ValueError(f"instruction must contain {IMAGE_PLACEHOLDER} exactly once: {instruction!r}")
        block = image_block(self.vocabulary, lr_codes, self.grammar.grid_unit)
        before, after = (self._encode(piece) if piece else [] for piece in pieces)
        return np.array([self.vocabulary.bos, *before, *block, *after, self.vocabulary.turn_end], dtype=np.int32)

    def chain(self, texts: Sequence[str], codes: Sequence[np.ndarray]) -> np.ndarray:
        """int32 ids of a complete answer, turn end included.

        Args:
            texts: degradation, coarse, middle, fine description; one whose block the layout leaves out is not used.
            codes: int codes [h, w] of the layout's images, from coarse to final.

        Raises:
            ValueError: a text is empty or holds a tag, or an image has not the grid of its step.
        """
        said = dict(zip(TEXT_TAGS, texts, strict=True))
        text_of = {tag: said[tag] for tag in self._text_tags}
        for tag, text in text_of.items():
            if not text.strip() or ANY_TAG.search(text):
                raise ValueError(f"the text of <{tag}> must be non-empty and free of chain tags, got {text!r}")
        shapes = tuple(tuple(c.shape) for c in codes)
        if shapes != self.grammar.grids:
            raise ValueError(f"the chain's images must have {self.grammar.grids} codes, got {shapes}")
        codes_of = dict(zip(self._image_tags, codes, strict=True))
        ids: list[int] = []
        pending = ""
        for tag in self.layout.blocks:
            pending += f"<{tag}>" + text_of.get(tag, "")
            if tag in codes_of:
                ids += self._encode(pending)
                ids += image_block(self.vocabulary, codes_of[tag], self.grammar.grid_unit)
                pending = ""
            pending += f"</{tag}>"
        return np.array([*ids, *self._encode(pending), self.vocabulary.turn_end], dtype=np.int32)

    def parse(self, ids: Sequence[int]) -> ParsedChain:
        """Read a chain. Total: any sequence of integers gives a :class:`ParsedChain`, nothing raises."""
        text, images, errors = self._flatten([int(i) for i in ids])
        blocks = {tag: _single_block(text, tag) for tag in self.layout.blocks}
        errors += _structure_errors(text, self.layout.blocks)
        texts = {t: _clean(blocks[t]) for t in self._text_tags}
        errors += [f"<{t}> is empty or holds an image" for t in texts if blocks[t] is not None and not texts[t]]
        codes: list[np.ndarray | None] = []
        for tag, grid in zip(self._image_tags, self.grammar.grids, strict=True):
            image = _single_image(blocks[tag], images)
            if blocks[tag] is not None and (image is None or image.shape != grid):
                errors.append(f"<{tag}> does not hold exactly one complete image of {grid[0]}x{grid[1]} codes")
            codes.append(image if image is not None and image.shape == grid else None)
        degradation, coarse, middle, fine = (texts.get(t) for t in TEXT_TAGS)
        return ParsedChain(degradation, coarse, middle, fine, tuple(codes), tuple(errors))

    def _flatten(self, ids: list[int]) -> tuple[str, list[np.ndarray], list[str]]:
        """Text with image marks, the complete images, and what was wrong on the way."""
        v = self.vocabulary
        parts: list[str] = []
        images: list[np.ndarray] = []
        errors: list[str] = []
        run: list[int] = []
        stray: list[int] = []
        end = ids.index(v.turn_end) if v.turn_end in ids else len(ids)
        if end == len(ids):
            errors.append("the chain does not end with the end of the turn")
        elif end != len(ids) - 1:
            errors.append("ids follow the end of the turn")
        ids = ids[:end]

        def flush() -> None:
            if run:
                parts.append(_MARKS.sub("\ufffd", self._decode(run)))
                run.clear()

        position = 0
        while position < end:
            token = ids[position]
            if token == v.image_start:
                flush()
                codes, position = self._read_image(ids, position + 1)
                if codes is None:
                    errors.append("an image is incomplete")
                    parts.append(f"{_OPEN}x{_CLOSE}")
                else:
                    parts.append(f"{_OPEN}{len(images)}{_CLOSE}")
                    images.append(codes)
                continue
            if 0 <= token < v.size and v.is_text[token]:
                run.append(token)
            else:
                stray.append(token)
            position += 1
        flush()
        if stray:
            errors.append(f"{len(stray)} ids are neither text nor part of an image, the first is {stray[0]}")
        return "".join(parts), images, errors

    def _read_image(self, ids: list[int], start: int) -> tuple[np.ndarray | None, int]:
        """Codes [h, w] of the block whose first grid token is at ``start``, and where it ends."""
        v = self.vocabulary
        units = [v.units_of_id.get(i, 0) for i in ids[start : start + 2]]
        if len(units) < 2 or 0 in units:
            return None, start
        rows, columns = (n * self.grammar.grid_unit for n in units)
        position, codes = start + 2, []
        for _ in range(rows):
            row = [int(v.code_of_id[i]) if 0 <= i < v.size else -1 for i in ids[position : position + columns]]
            position += len(row)
            if len(row) < columns or min(row) < 0 or ids[position : position + 1] != [v.new_line]:
                return None, position
            codes.append(row)
            position += 1
        if ids[position : position + 1] != [v.image_end]:
            return None, position
        return np.array(codes, dtype=np.int64), position + 1


@dataclass(frozen=True, eq=False)
class ParsedChain:
    """What a policy wrote.

    Attributes:
        degradation, coarse, middle, fine: text of the block, None where it is absent, doubled, empty or
            holds a tag or an image, and where the layout has no such block.
        images: int64 codes [h, w] of the layout's images, from coarse to final, None where absent or wrong.
        errors: why the chain is not well-formed; empty when it is.
    """

    degradation: str | None
    coarse: str | None
    middle: str | None
    fine: str | None
    images: tuple[np.ndarray | None, ...]
    errors: tuple[str, ...]

    @property
    def well_formed(self) -> bool:
        """Each block of the layout once and in order, texts not empty, images complete and of the right grid."""
        return not self.errors

    @property
    def texts(self) -> tuple[str | None, ...]:
        """Degradation, coarse, middle and fine text."""
        return self.degradation, self.coarse, self.middle, self.fine


def _single_block(text: str, tag: str) -> str | None:
    opened, closed = f"<{tag}>", f"</{tag}>"
    if text.count(opened) != 1 or text.count(closed) != 1:
        return None
    start, stop = text.index(opened) + len(opened), text.index(closed)
    return text[start:stop] if start <= stop else None


def _structure_errors(text: str, tags: Sequence[str]) -> list[str]:
    """Every tag exactly once, in order, with only white space between the blocks (linear in the text)."""
    wrong = [t for t in tags if _single_block(text, t) is None]
    if wrong:
        return [f"<{t}> does not stand exactly once" for t in wrong]
    position = 0
    for tag in tags:
        opened, closed = f"<{tag}>", f"</{tag}>"
        start = text.index(opened)
        if start < position:
            return ["the blocks are out of order"]
        if text[position:start].strip():
            return [f"text stands before <{tag}> outside of any block"]
        position = text.index(closed) + len(closed)
    return ["text follows the last block"] if text[position:].strip() else []


def _clean(block: str | None) -> str | None:
    if block is None or ANY_TAG.search(block) or _IMAGE_MARK.search(block):
        return None
    return block.strip() or None


def _single_image(block: str | None, images: list[np.ndarray]) -> np.ndarray | None:
    match = _IMAGE_MARK.fullmatch(block.strip()) if block is not None else None
    return images[int(match[1])] if match and match[1] != "x" else None
