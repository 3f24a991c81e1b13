"""Tiles cover the picture, and feathering leaves no edge."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rl_system.studies.restore.tiles import Feathering, TilePlan

pytestmark = pytest.mark.unit


@given(st.integers(8, 40), st.integers(0, 300), st.integers(0, 300), st.data())
def test_tiles_lie_inside_overlap_enough_and_are_as_few_as_can_be(side, more_rows, more_columns, data):
    overlap = data.draw(st.integers(0, side // 2))
    plan = TilePlan.of(side + more_rows, side + more_columns, side, overlap)
    for starts, length in ((plan.rows, plan.height), (plan.columns, plan.width)):
        assert starts[0] == 0 and starts[-1] == length - side
        assert all(0 < b - a <= side - overlap for a, b in pairwise(starts))
        reach_of_one_less = side + (len(starts) - 2) * (side - overlap)
        assert len(starts) == 1 or reach_of_one_less < length
    assert len(plan) == len(plan.corners)


@given(st.integers(0, 90), st.integers(0, 12), st.integers(0, 2**32 - 1))
def test_tiles_of_one_picture_give_it_back(more, overlap, seed):
    picture = np.random.default_rng(seed).random((24 + more, 30, 3))
    plan = TilePlan.of(24 + more, 30, 24, overlap)
    feathering = Feathering(plan)
    for index in range(len(plan)):
        feathering.add(index, plan.cut(picture, index))
    np.testing.assert_allclose(feathering.picture(), picture, atol=1e-6)


def across_and_inside(length: int, side: int, overlap: int) -> tuple[float, float]:
    """Largest step between neighbouring pixels at the edges of tiles, and elsewhere, where each tile is of one
    brightness, as different as can be from its neighbours'."""
    plan = TilePlan.of(length, length, side, overlap)
    feathering = Feathering(plan)
    for index in range(len(plan)):
        row, column = divmod(index, len(plan.columns))
        feathering.add(index, np.full((side, side, 3), float((row + column) % 2)))
    steps = np.abs(np.diff(feathering.picture()[..., 0], axis=1))
    edges = sorted({e - 1 for s in plan.columns for e in (s, s + side) if 0 < e < length})
    return float(steps[:, edges].max()), float(np.delete(steps, edges, axis=1).max())


def test_no_step_at_an_edge_is_larger_than_the_feather_itself():
    across, inside = across_and_inside(160, 64, 16)
    assert across <= inside < 1.5 / 16  # from 0 to 1 over the 16 shared pixels, half a step at either end
    assert across_and_inside(192, 64, 0)[0] == 1  # the test would see a seam


def test_a_pixel_of_one_tile_alone_is_that_tiles():
    plan = TilePlan.of(64, 112, 64, 16)
    feathering = Feathering(plan)
    left, right = np.full((64, 64, 3), 0.25), np.full((64, 64, 3), 0.75)
    feathering.add(0, left)
    feathering.add(1, right)
    picture = feathering.picture()
    assert (picture[:, :48] == 0.25).all() and (picture[:, 64:] == 0.75).all()
    assert (np.diff(picture[0, 47:65, 0]) > 0).all()


@pytest.mark.parametrize(("height", "side", "overlap"), [(63, 64, 0), (64, 64, 33), (64, 64, -1)])
def test_what_cannot_be_tiled_is_refused(height, side, overlap):
    with pytest.raises(ValueError, match="tile"):
        TilePlan.of(height, 64, side, overlap)
