"""Which ids may come next in a chain. The one definition that sampler, learner and parser share.

A chain is text with up to ``len(grids)`` image blocks (:mod:`vlcot.sequence`). Inside an image block only
codes are a choice; grid sizes, row ends and the image end follow from the layout, so they are forced:
probability 1, no loss. In text any text id, the end of the turn and, while images remain, the start of
the next image may come. Whether the tags are right is not enforced: that is what the format reward teaches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np

from vlcot.vocabulary import Vocabulary


class Support(IntEnum):
    """The set of ids allowed at one position."""

    FORCED = 0
    """One id only: log-prob 0, no loss."""
    CODE = 1
    """The image codes."""
    TEXT = 2
    """Text, turn end, image start."""
    LAST_TEXT = 3
    """Text and turn end: every image of the layout is drawn."""


CHOICES = (Support.CODE, Support.TEXT, Support.LAST_TEXT)
"""The supports with more than one id."""


@dataclass(frozen=True, eq=False)
class Grammar:
    """Grammar of one layout.

    Attributes:
        vocabulary: ids of the family.
        grids: (rows, columns) in codes of each image of the chain, in order.
        grid_unit: codes per grid unit along a side (PURE: 32 px / 8 px = 4).
    """

    vocabulary: Vocabulary
    grids: tuple[tuple[int, int], ...]
    grid_unit: int
    blocks: tuple[tuple[int, ...], ...] = field(init=False, repr=False)
    """Per image: the ids that must follow ``image_start``, -1 where a code is chosen."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "blocks", tuple(self._block(h, w) for h, w in self.grids))

    def _block(self, rows: int, columns: int) -> tuple[int, ...]:
        v = self.vocabulary
        units = rows // self.grid_unit, columns // self.grid_unit
        if any(n * self.grid_unit != side for n, side in zip(units, (rows, columns), strict=True)) or any(
            n not in v.grid_ids for n in units
        ):
            raise ValueError(f"an image of {rows}x{columns} codes has no grid tokens (unit: {self.grid_unit} codes)")
        row = (-1,) * columns + (v.new_line,)
        return (v.grid_ids[units[0]], v.grid_ids[units[1]], *(row * rows), v.image_end)

    def support_ids(self, support: Support) -> np.ndarray:
        """int64, sorted; the ids of a support that is a choice.

        Raises:
            ValueError: ``FORCED`` has no fixed ids.
        """
        if support is Support.CODE:
            return np.sort(self.vocabulary.image_ids)
        if support is Support.FORCED:
            raise ValueError("FORCED has one id per position, not a set")
        return self.vocabulary.text_support(image_may_start=support is Support.TEXT)

    def supports(self, ids: Sequence[int]) -> np.ndarray:
        """uint8 [len(ids)]: the :class:`Support` under which each id of a chain was chosen.

        Raises:
            ValueError: an id that the grammar does not allow, with its position.
        """
        state = ChainState(self)
        kinds = np.empty(len(ids), dtype=np.uint8)
        for position, token in enumerate(ids):
            kinds[position] = state.next()[0]
            if not state.allows(int(token)):
                raise ValueError(f"id {token} at position {position} is not in support {state.next()[0].name}")
            state.advance(int(token))
        return kinds


class ChainState:
    """Where a chain stands; advanced one id at a time in O(1)."""

    __slots__ = ("_grammar", "_position", "finished", "images")

    def __init__(self, grammar: Grammar) -> None:
        self._grammar = grammar
        self._position = -1
        self.images = 0
        """Image blocks begun."""
        self.finished = False

    def next(self) -> tuple[Support, int]:
        """The support of the next position, and its id where it is ``FORCED`` (else -1)."""
        grammar = self._grammar
        if self.finished:
            return Support.FORCED, grammar.vocabulary.pad
        if self._position < 0:
            return (Support.TEXT if self.images < len(grammar.grids) else Support.LAST_TEXT), -1
        forced = grammar.blocks[self.images - 1][self._position]
        return (Support.CODE, -1) if forced < 0 else (Support.FORCED, forced)

    def allows(self, token: int) -> bool:
        """Whether ``token`` may come next."""
        support, forced = self.next()
        vocabulary = self._grammar.vocabulary
        if not 0 <= token < vocabulary.size:
            return False
        if support is Support.FORCED:
            return token == forced
        if support is Support.CODE:
            return bool(vocabulary.code_of_id[token] >= 0)
        if token == vocabulary.image_start:
            return support is Support.TEXT
        return bool(vocabulary.is_text[token]) or token == vocabulary.turn_end

    def advance(self, token: int) -> None:
        """Take ``token`` as the next id; an id outside the support leaves text and blocks as they stand."""
        grammar = self._grammar
        if self.finished:
            return
        if self._position >= 0:
            self._position += 1
            if self._position == len(grammar.blocks[self.images - 1]):
                self._position = -1
        elif token == grammar.vocabulary.turn_end:
            self.finished = True
        elif token == grammar.vocabulary.image_start and self.images < len(grammar.grids):
            self.images += 1
            self._position = 0
