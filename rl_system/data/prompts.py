"""From rows to prompts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from rl_system.data.rows import Row, RowSource
from vlcot.groups import Prompt
from vlcot.images import upscale_for_policy
from vlcot.policy.family import Family

if TYPE_CHECKING:  # it brings transformers' modelling code with it, seconds of CPU
    from vlcot.tokenizer.image import ImageTokenizer


class PromptBuilder:
    """Writes the question of a row: the LR image is up-scaled to full size and tokenised.

    Args:
        instruction: text with ``<|image|>``.
    """

    def __init__(self, family: Family, tokenizer: ImageTokenizer, instruction: str) -> None:
        self._builder = family.builder
        self._size = family.layout.full_size
        self._tokenizer = tokenizer
        self._instruction = instruction

    def build(self, row: Row, group_id: str, seed: int) -> Prompt:
        """The prompt of ``row``."""
        full = upscale_for_policy(row.lr, self._size)
        ids = self._builder.prompt(self._instruction, self._tokenizer.encode(full[None])[0].numpy())
        return Prompt(group_id, row.row_id, seed, ids, row.lr, row.degradation, row.hq, row.objects)


def training_prompts(
    source: RowSource, builder: PromptBuilder, rows: int, seed: int, skip: int = 0
) -> Iterator[Prompt]:
    """Endless prompts: epoch after epoch over ``rows`` training rows, each epoch shuffled by the seed.

    Args:
        skip: leave out so many at the start, of a run that has admitted them before.
    """
    epoch, start = divmod(skip, rows)
    while True:
        order = np.random.default_rng([seed, epoch]).permutation(rows).tolist()
        for place, index in enumerate(order[start:], start):
            row = source.row(index, "train")
            identity = f"epoch-{epoch}/{row.row_id}"
            sample_seed = int(np.random.default_rng([seed, epoch, place, 1]).integers(2**31))
            prompt = builder.build(replace(row, row_id=identity), identity, sample_seed)
            yield prompt
        epoch, start = epoch + 1, 0
