"""Cutting a picture into the squares that a policy can draw, and feathering them together again."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class TilePlan:
    """Where the tiles of a picture lie. Tile ``i`` covers ``side`` pixels from each of ``corners[i]``.

    Attributes:
        height, width: of the picture in pixels, at least ``side`` each.
        side: of a tile.
        rows, columns: first pixel of each row and column of tiles, ascending.
    """

    height: int
    width: int
    side: int
    rows: tuple[int, ...]
    columns: tuple[int, ...]

    @classmethod
    def of(cls, height: int, width: int, side: int, overlap: int) -> TilePlan:
        """As few tiles as overlap their neighbours by ``overlap`` pixels at least, evenly spread.

        Raises:
            ValueError: the picture is smaller than a tile, or the overlap is not in [0, side / 2].
        """
        if not 0 <= overlap <= side / 2:
            raise ValueError(f"an overlap of {overlap} is not between 0 and half of a tile of {side}")
        return cls(height, width, side, _starts(height, side, overlap), _starts(width, side, overlap))

    @property
    def corners(self) -> tuple[tuple[int, int], ...]:
        """Top and left of each tile, row by row."""
        return tuple((top, left) for top in self.rows for left in self.columns)

    def __len__(self) -> int:
        return len(self.rows) * len(self.columns)

    def cut(self, picture: np.ndarray, index: int) -> np.ndarray:
        """View of tile ``index`` of ``picture`` [height, width, ...]."""
        top, left = self.corners[index]
        return picture[top : top + self.side, left : left + self.side]


class Feathering:
    """Sums tiles under weights that fall off linearly where neighbours overlap; single precision.

    A pixel of one tile alone is that tile's; where tiles overlap, a tile's weight is next to nothing at its edge, so
    that no edge shows whatever the neighbour holds.
    """

    def __init__(self, plan: TilePlan) -> None:
        self._plan = plan
        self._rows = _ramps(plan.rows, plan.side)
        self._columns = _ramps(plan.columns, plan.side)
        self._sum = np.zeros((plan.height, plan.width, 3), np.float32)
        self._weight = np.zeros((plan.height, plan.width, 1), np.float32)

    def add(self, index: int, tile: np.ndarray) -> None:
        """Lay tile ``index``, float [side, side, 3], into its place; each tile once."""
        row, column = divmod(index, len(self._plan.columns))
        weight = (self._rows[row][:, None] * self._columns[column])[..., None]
        self._plan.cut(self._sum, index)[...] += weight * tile
        self._plan.cut(self._weight, index)[...] += weight

    def picture(self) -> np.ndarray:
        """float32 [height, width, 3], once all tiles are in place."""
        return self._sum / self._weight


def _starts(length: int, side: int, overlap: int) -> tuple[int, ...]:
    if length < side:
        raise ValueError(f"{length} pixels are fewer than a tile of {side}")
    count = max(1, math.ceil((length - overlap) / (side - overlap)))
    return tuple(i * (length - side) // max(count - 1, 1) for i in range(count))


def _ramps(starts: tuple[int, ...], side: int) -> list[np.ndarray]:
    """Weight of each pixel along one axis of each tile, by what it shares with the tile before and behind it."""
    ramps = []
    for place, start in enumerate(starts):
        weight = np.ones(side, np.float32)
        if place > 0:
            shared = starts[place - 1] + side - start
            weight[:shared] *= _rise(shared)
        if place + 1 < len(starts):
            shared = start + side - starts[place + 1]
            weight[side - shared :] *= _rise(shared)[::-1]
        ramps.append(weight)
    return ramps


def _rise(length: int) -> np.ndarray:
    return ((np.arange(length) + 0.5) / max(length, 1)).astype(np.float32)
