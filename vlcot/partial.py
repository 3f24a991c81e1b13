"""A chain while it is being written: the texts and images that are there so far."""

from __future__ import annotations

import re

import numpy as np

from vlcot.grammar import ChainState, Support
from vlcot.policy.family import Family
from vlcot.sequence import ANY_TAG, IMAGE_TAGS, TEXT_TAGS

_PART_OF_TAG = re.compile(r"<[/a-z_]*$|\ufffd+$")


class PartialChain:
    """Follows a chain id by id, each in O(1); texts are read when they are asked for.

    Args:
        family: whose grammar the ids follow.
    """

    def __init__(self, family: Family) -> None:
        blocks = family.layout.blocks
        self.text_tags = tuple(tag for tag in TEXT_TAGS if tag in blocks)
        self.image_tags = tuple(tag for tag in IMAGE_TAGS if tag in blocks)
        self.images: list[np.ndarray] = []
        """int64 codes [h, w] of the images that are complete, in the order of ``image_tags``."""
        self._family = family
        self._grammar = family.grammar
        self._state = ChainState(self._grammar)
        self._text: list[int] = []
        self._codes: list[int] = []

    def take(self, token: int) -> bool:
        """Go on by one id; whether it completed an image.

        Raises:
            ValueError: the grammar does not allow the id here.
        """
        if not self._state.allows(token):
            raise ValueError(f"id {token} is not in support {self._state.next()[0].name}")
        vocabulary, support = self._grammar.vocabulary, self._state.next()[0]
        self._state.advance(token)
        if support is Support.CODE:
            self._codes.append(int(vocabulary.code_of_id[token]))
        elif support in (Support.TEXT, Support.LAST_TEXT) and vocabulary.is_text[token]:
            self._text.append(token)
        elif token == vocabulary.image_end:
            self.images.append(np.array(self._codes, dtype=np.int64).reshape(self._grammar.grids[len(self.images)]))
            self._codes = []
            return True
        return False

    @property
    def drawing(self) -> tuple[int, int] | None:
        """Codes there are, and codes there will be, of the image that is being drawn; None between images."""
        if self._state.images == len(self.images):
            return None
        rows, columns = self._grammar.grids[len(self.images)]
        return len(self._codes), rows * columns

    @property
    def texts(self) -> dict[str, str]:
        """Tag of each text block that was opened -> what stands in it so far, without a tag that is half written."""
        text = self._family.text.decode(self._text)
        found = {}
        for tag in self.text_tags:
            _, opened, rest = text.partition(f"<{tag}>")
            if opened:
                end = ANY_TAG.search(rest)
                found[tag] = (rest[: end.start()] if end else _PART_OF_TAG.sub("", rest)).strip()
        return found
