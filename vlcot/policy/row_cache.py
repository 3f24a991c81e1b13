"""Keys and values of rows that are sampled together, each at its own position, and the attention of one new id a row.

Several caches can share one forward pass (:class:`NextIds`): the linear layers see all ids as one batch, and each row
attends to its own cache only. Rows that have no new id keep what they have.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention


class RowCache:
    """Keys and values, allocated at once for the longest row there can be.

    Args:
        config: of the policy (``VlcotConfig``).
        rows, capacity: how many rows, and ids of a row.
        like: any parameter of the policy; its dtype and device are taken.

    Attributes:
        lengths: int64 [rows] on the CPU, ids of each row.
    """

    def __init__(self, config: Any, rows: int, capacity: int, like: torch.Tensor) -> None:
        shape = (rows, config.num_key_value_heads, capacity, config.head_dim)
        self.keys, self.values = (
            [torch.zeros(shape, dtype=like.dtype, device=like.device) for _ in range(config.num_hidden_layers)]
            for _ in range(2)
        )
        self.lengths = torch.zeros(rows, dtype=torch.long)

    def fill(self, rows: slice, keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor]) -> None:
        """Give ``rows`` one beginning: per layer [1, heads, ids, head_dim]."""
        length = keys[0].shape[2]
        for ours, theirs in ((self.keys, keys), (self.values, values)):
            for layer, new in zip(ours, theirs, strict=True):
                layer[rows, :, :length] = new
        self.lengths[rows] = length

    def restart(self, rows: Sequence[int]) -> None:
        """Empty these rows."""
        self.lengths[torch.tensor(rows, dtype=torch.long)] = 0

    def keep(self, rows: Sequence[int]) -> None:
        """Drop all rows but these, in this order."""
        index = torch.tensor(rows, dtype=torch.long)
        self.lengths = self.lengths[index]
        index = index.to(self.keys[0].device)
        for tensors in (self.keys, self.values):
            for layer, tensor in enumerate(tensors):
                tensors[layer] = tensor[index]


@dataclass(frozen=True, eq=False)
class _Part:
    """The rows of one cache that get an id: which, where it goes, and what every row of the cache may see."""

    cache: RowCache
    rows: torch.Tensor
    places: torch.Tensor
    is_whole: bool
    seen: torch.Tensor

    @classmethod
    def of(cls, cache: RowCache, rows: Sequence[int]) -> _Part:
        index = torch.tensor(rows, dtype=torch.long)
        places = cache.lengths[index]
        cache.lengths[index] += 1
        last = cache.lengths.clamp(min=1) - 1
        columns = torch.arange(int(places.max()) + 1)
        device = cache.keys[0].device
        # Rows without an id are computed with the others and thrown away; they must see something, or NaN results.
        seen = (columns <= last[:, None])[:, None, None].to(device)
        whole = len(rows) == len(cache.lengths) and bool((index == torch.arange(len(rows))).all())
        return cls(cache, index.to(device), places.to(device), whole, seen)

    def attend(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float):
        """[ids, heads, head_dim] each, and so is the result."""
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        keys[self.rows, :, self.places] = key
        values[self.rows, :, self.places] = value
        if not self.is_whole:
            query = query.new_zeros(len(keys), *query.shape[1:]).index_copy_(0, self.rows, query)
        width = self.seen.shape[-1]
        output = scaled_dot_product_attention(
            query[:, :, None],
            keys[:, :, :width],
            values[:, :, :width],
            attn_mask=self.seen,
            scale=scale,
            enable_gqa=keys.shape[1] != query.shape[1],
        )[:, :, 0]
        return output if self.is_whole else output[self.rows]


class NextIds:
    """One new id for some rows of some caches; making one takes the places of the ids.

    Args:
        parts: caches and which of their rows, each row once; the ids come in this order.

    Attributes:
        positions: int64 [ids], of the ids in their rows.
    """

    def __init__(self, parts: Sequence[tuple[RowCache, Sequence[int]]]) -> None:
        self._parts = [_Part.of(cache, rows) for cache, rows in parts if len(rows)]
        self._counts = [len(part.rows) for part in self._parts]
        self.positions = torch.cat([part.places for part in self._parts])

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """Store keys and values and attend; tensors [1, heads, ids, head_dim], as is the result."""
        packed = (tensor[0].transpose(0, 1).split(self._counts) for tensor in (query, key, value))
        outputs = [part.attend(layer, *own, scale) for part, *own in zip(self._parts, *packed, strict=True)]
        return torch.cat(outputs).transpose(0, 1)[None]
