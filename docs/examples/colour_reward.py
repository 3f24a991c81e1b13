"""A reward of one's own: restorations should keep the colours of the photograph that they restore.

Degradations blur and add noise, but hardly change the mean colour of a region; a policy that paints grass blue earns
less. Switched on by two overrides, from the folder of this file (docs/reward-servers.md):

    rl-system train experiment=toy '+reward.extra.colour={target: "colour_reward:ColourReward", weight: 0.5}'
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image


class ColourReward:
    """1 for the mean colours of the photograph in every cell of a grid, 0 from ``tolerance`` grey levels off.

    Args:
        grid: cells per side.
        tolerance: mean absolute difference, in grey levels of 0 to 255, that counts as 0.
    """

    def __init__(self, grid: int = 4, tolerance: float = 32.0) -> None:
        if grid < 1 or tolerance <= 0:
            raise ValueError(f"grid must be at least 1 and tolerance positive, got {grid} and {tolerance}")
        self._grid = grid
        self._tolerance = tolerance

    def score(self, lr: np.ndarray, images: Sequence[np.ndarray]) -> list[float]:
        """A reward in [0, 1] for each restoration uint8 [H, W, 3] of ``lr`` uint8 [h, w, 3]."""
        wanted = self._colours(lr)
        errors = [float(np.abs(self._colours(image) - wanted).mean()) for image in images]
        return [max(0.0, 1.0 - error / self._tolerance) for error in errors]

    def _colours(self, image: np.ndarray) -> np.ndarray:
        """float64 [grid, grid, 3]: the mean of each cell."""
        cells = Image.fromarray(image).resize((self._grid, self._grid), Image.Resampling.BOX)
        return np.asarray(cells, dtype=np.float64)
