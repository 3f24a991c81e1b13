"""Batches of prepared examples, and the held-out questions."""

from __future__ import annotations

from functools import cached_property

import numpy as np

from learners.protocols import Example
from rl_system.data.prepared import PreparedData
from rl_system.data.rows import PreparedRows, Split, prepared_splits
from vlcot.groups import Prompt


class PreparedExamples:
    """An :class:`learners.protocols.ExampleSource` over a prepared folder. Picklable.

    A step's examples follow from its number: epoch after epoch over the training split, each shuffled by the seed; a
    batch at the border of two has the end of one and the start of the next.

    Args:
        path: folder of `rl-system prepare-data`.
        batch_size: examples of a step.
        held_out: at most so many held-out examples.
    """

    def __init__(self, path: str, batch_size: int, seed: int, held_out: int) -> None:
        self._path = path
        self._batch_size = batch_size
        self._seed = seed
        self._held_out = held_out

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in vars(self).items() if name not in ("_data", "_splits")}

    @cached_property
    def _data(self) -> PreparedData:
        return PreparedData(self._path)

    @cached_property
    def _splits(self) -> dict[Split, list[int]]:
        return prepared_splits(self._data)

    def examples(self, step: int) -> list[Example]:
        """The batch of ``step`` (1, 2, ...)."""
        train = self._splits["train"]
        first = (step - 1) * self._batch_size
        rows = []
        for place in range(first, first + self._batch_size):
            epoch, index = divmod(place, len(train))
            rows.append(train[self._order(epoch)[index]])
        return [self._example(row) for row in rows]

    def held_out(self) -> list[Example]:
        """The first held-out examples."""
        return [self._example(row) for row in self._splits["heldout"][: self._held_out]]

    def _order(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self._seed, epoch]).permutation(len(self._splits["train"]))

    def _example(self, row: int) -> Example:
        found = self._data.example(row)
        return Example(found.prompt_ids, found.answer_ids)


def held_out_prompts(path: str, size: int, count: int, seed: int) -> list[tuple[Prompt, np.ndarray]]:
    """Questions of the first ``count`` held-out rows, each with its target: uint8 [size, size, 3] RGB."""
    data, rows = PreparedData(path), PreparedRows(path, size, with_objects=False)
    prompts = []
    for index, place in enumerate(prepared_splits(data)["heldout"][:count]):
        row = rows.row(index, "heldout")
        sampled = int(np.random.default_rng([seed, 3, index]).integers(2**31))
        ids = data.example(place).prompt_ids
        prompts.append((Prompt(f"heldout/{row.row_id}", row.row_id, sampled, ids, row.lr, row.degradation), row.hq))
    return prompts


def check_layout(path: str, size: int) -> int:
    """Examples of the training split.

    Raises:
        ValueError: no prepared folder, of another image size than ``size``, or without rows for a split.
    """
    PreparedRows(path, size, with_objects=False)
    return len(prepared_splits(PreparedData(path))["train"])
