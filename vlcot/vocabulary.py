"""The ids of one model family, read from its tokenizer's token table.

Names and ids follow Chameleon / Lumina-mGPT / PURE (``item_processor.py``, ``vocab.py``): ``<racm3:break>``
opens an image, ``<eoss>`` closes it, ``<reserved08706>`` ends a turn, ``<reserved08799>`` ends a row of
codes, ``<reserved{8800+n:05d}>`` says that a side has ``n`` grid units, ``IMGIMG<letters>Z`` is a code.
The toy family uses the same names at small ids.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

BOS, PAD, EOS, UNK = "<s>", "<pad>", "</s>", "<unk>"
IMAGE_START, IMAGE_END = "<racm3:break>", "<eoss>"
TURN_END, NEW_LINE = "<reserved08706>", "<reserved08799>"
MAX_GRID_UNITS = 64

_CODE_NAME = re.compile(r"IMGIMG([A-J]+)Z")
_SPECIAL_NAME = re.compile(r"<s>|<pad>|</s>|<unk>|<racm3:break>|<eoss>|<reserved\d{5}>|<\|?image\|?>|<mask>")
_LETTER_DIGITS = str.maketrans("ABCDEFGHIJ", "0123456789")


def grid_name(units: int) -> str:
    """Token name of a side of ``units`` grid units (``<reserved08804>`` for 4)."""
    return f"<reserved{8800 + units:05d}>"


def code_name(code: int) -> str:
    """Token name of image code ``code``: digits written as letters A..J."""
    return "IMGIMG" + "".join("ABCDEFGHIJ"[int(digit)] for digit in str(code)) + "Z"


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """Special, text and image ids.

    Attributes:
        size: rows of the embedding (ids are below it).
        grid_ids: grid units of a side -> id.
        image_ids: int64 [codebook]; ``image_ids[code]`` is the token id of the code (a bijection).
        text_ids: int64, sorted; ids that text may consist of.
    """

    size: int
    bos: int
    pad: int
    eos: int
    image_start: int
    image_end: int
    new_line: int
    turn_end: int
    grid_ids: Mapping[int, int]
    image_ids: np.ndarray
    text_ids: np.ndarray

    @classmethod
    def from_token_table(cls, table: Mapping[str, int], size: int | None = None) -> Vocabulary:
        """Read the ids from a tokenizer's ``get_vocab()``.

        Raises:
            ValueError: a required token is absent, the image codes are not exactly 0..K-1, or an id is
                not below ``size``.
        """
        missing = [n for n in (BOS, PAD, EOS, IMAGE_START, IMAGE_END, TURN_END, NEW_LINE) if n not in table]
        if missing:
            raise ValueError(f"tokenizer has no token named {', '.join(missing)}: it is not of the Chameleon family")
        codes = {int(m[1].translate(_LETTER_DIGITS)): i for n, i in table.items() if (m := _CODE_NAME.fullmatch(n))}
        if sorted(codes) != list(range(len(codes))) or len(set(codes.values())) != len(codes) or not codes:
            raise ValueError(f"image tokens IMGIMG*Z must number 0..K-1 once each; found {len(codes)} of them")
        size = max(table.values()) + 1 if size is None else size
        if max(table.values()) >= size:
            raise ValueError(f"tokenizer has id {max(table.values())}, but the model has only {size} embedding rows")
        text = [i for n, i in table.items() if not _SPECIAL_NAME.fullmatch(n) and not _CODE_NAME.fullmatch(n)]
        return cls(
            size=size,
            bos=table[BOS],
            pad=table[PAD],
            eos=table[EOS],
            image_start=table[IMAGE_START],
            image_end=table[IMAGE_END],
            new_line=table[NEW_LINE],
            turn_end=table[TURN_END],
            grid_ids={n: table[grid_name(n)] for n in range(1, MAX_GRID_UNITS + 1) if grid_name(n) in table},
            image_ids=np.array([codes[c] for c in range(len(codes))], dtype=np.int64),
            text_ids=np.array(sorted(text), dtype=np.int64),
        )

    @cached_property
    def code_of_id(self) -> np.ndarray:
        """int64 [size]; the image code of an id, -1 for ids that are not image codes."""
        codes = np.full(self.size, -1, dtype=np.int64)
        codes[self.image_ids] = np.arange(len(self.image_ids))
        return codes

    @cached_property
    def is_text(self) -> np.ndarray:
        """bool [size]; whether an id is ordinary text."""
        flags = np.zeros(self.size, dtype=bool)
        flags[self.text_ids] = True
        return flags

    @cached_property
    def units_of_id(self) -> Mapping[int, int]:
        """Inverse of ``grid_ids``."""
        return {i: n for n, i in self.grid_ids.items()}

    def text_support(self, *, image_may_start: bool) -> np.ndarray:
        """int64, sorted; what may follow in text: text, the end of the turn and, if asked, an image."""
        extra = [self.turn_end, self.image_start] if image_may_start else [self.turn_end]
        return np.sort(np.concatenate([self.text_ids, np.array(extra, dtype=np.int64)]))
