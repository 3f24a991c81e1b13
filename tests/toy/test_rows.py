"""Rows of the toy task, and the two shared resizes."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from toy.photographs import crop
from toy.rows import DEGRADATION, LAYOUT, row
from vlcot.degradation import COMPONENT_COUNT, components
from vlcot.degradation import vocabulary as phrases
from vlcot.images import area_downscale, upscale_for_policy

pytestmark = pytest.mark.unit


def test_a_row_is_random_access_and_seeded() -> None:
    first, again, other_seed, heldout = row(37, "train"), row(37, "train"), row(37, "train", 1), row(37, "heldout")
    assert np.array_equal(first.hq, again.hq) and np.array_equal(first.lr, again.lr)
    assert first.texts == again.texts and first.objects == again.objects
    assert first.row_id == "train/000037" and heldout.row_id == "heldout/000037"
    assert not np.array_equal(first.hq, other_seed.hq) and not np.array_equal(first.hq, heldout.hq)


def test_shapes_and_texts() -> None:
    vocabulary = phrases(DEGRADATION)
    for index in range(48):
        r = row(index, "heldout")
        assert r.hq.shape == (64, 64, 3) and r.lr.shape == (16, 16, 3) and r.hq.dtype == r.lr.dtype == np.uint8
        found = components(r.degradation)
        assert found is not None and len(found) == COMPONENT_COUNT
        assert all(said in allowed for said, allowed in zip(found, vocabulary, strict=True))
        assert all(text.strip() for text in r.texts)
        assert list(r.objects) == list(dict.fromkeys(o.name for o in crop(index, "heldout").objects))


def test_degradations_differ_between_rows_seeds_and_splits() -> None:
    texts = [row(i, split, seed).degradation for i in range(20) for split in ("train", "heldout") for seed in (0, 1)]
    assert len(set(texts)) >= 0.9 * len(texts)


def test_targets_are_the_crop_at_a_quarter_half_and_full_size() -> None:
    r = row(3, "train")
    coarse, middle, full = r.targets()
    assert [t.shape[0] for t in (coarse, middle, full)] == list(LAYOUT.image_sizes)
    assert np.array_equal(full, r.hq)
    assert np.array_equal(coarse[0, 0], np.rint(r.hq[:4, :4].reshape(-1, 3).mean(axis=0)))


def test_rows_need_no_transformers() -> None:
    code = "import sys, toy.rows; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_upscale_keeps_a_constant_image_and_size() -> None:
    flat = np.full((16, 16, 3), 77, dtype=np.uint8)
    assert np.array_equal(upscale_for_policy(flat, 64), np.full((64, 64, 3), 77))


def test_area_downscale_rounds_the_mean_of_each_block() -> None:
    image = np.zeros((4, 4, 3), dtype=np.uint8)
    image[:2, :2] = np.array([[[0], [1]], [[2], [4]]])
    assert area_downscale(image, 2)[:, :, 0].tolist() == [[2, 0], [0, 0]]
    assert np.array_equal(area_downscale(image, 4), image)


def test_bad_images_are_refused() -> None:
    square = np.zeros((6, 6, 3), dtype=np.uint8)
    with pytest.raises(ValueError, match="not a multiple"):
        area_downscale(square, 4)
    for wrong in (square[:4], square[..., 0], square.astype(np.float32)):
        with pytest.raises(ValueError, match="square uint8 RGB"):
            upscale_for_policy(wrong, 64)
