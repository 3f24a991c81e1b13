"""Composed scenes: determinism, exact boxes and masks, disjoint splits."""

import numpy as np
import pytest

from toy.scenes import scene, scene_names

pytestmark = pytest.mark.unit


def test_scene_is_random_access_and_seeded():
    first, again = scene(5, "train"), scene(5, "train")
    assert np.array_equal(first.image, again.image)
    assert not np.array_equal(first.image, scene(5, "train", seed=1).image)
    assert not np.array_equal(first.image, scene(5, "heldout").image)


def test_boxes_are_the_tight_bounds_of_disjoint_masks():
    for index in range(50):
        sample = scene(index, "train")
        assert 1 <= len(sample.objects) <= 2
        assert sum(o.mask.astype(int) for o in sample.objects).max() == 1
        for item in sample.objects:
            rows, cols = np.nonzero(item.mask)
            assert item.box == (cols.min(), rows.min(), cols.max() + 1, rows.max() + 1)


def test_every_name_appears_and_scales_differ_between_splits():
    assert len(scene_names()) == 8
    sides = {}
    for split in ("train", "heldout"):
        objects = [o for i in range(80) for o in scene(i, split).objects]
        assert {o.name for o in objects} == set(scene_names())
        sides[split] = {max(o.box[2] - o.box[0], o.box[3] - o.box[1]) % 2 for o in objects}
    assert sides == {"train": {0}, "heldout": {1}}
