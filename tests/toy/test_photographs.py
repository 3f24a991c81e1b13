"""Photographs, crops, captions and the held-out rule."""

from dataclasses import replace

import numpy as np
import pytest

from toy.photographs import GRID, crop, cut, load_photographs, object_names, split_of

pytestmark = pytest.mark.unit


def centre_cell(sample):
    height, width = load_photographs()[sample.photograph].pixels.shape[:2]
    x, y = sample.window.centre
    return sample.photograph, int(y / height * GRID), int(x / width * GRID)


def test_every_photograph_loads_with_objects_inside_it():
    photographs = load_photographs()
    assert len(photographs) == 16
    for photograph in photographs.values():
        height, width, channels = photograph.pixels.shape
        assert photograph.pixels.dtype == np.uint8 and channels == 3
        for item in photograph.objects:
            x0, y0, x1, y1 = item.box
            assert 0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height, (photograph.name, item)
            assert item.name.isalpha() and item.name.islower()


def test_crop_is_random_access_and_seeded():
    first, again = crop(37, "train"), crop(37, "train")
    assert np.array_equal(first.image, again.image) and first.captions == again.captions
    assert crop(37, "train", seed=1).window != first.window
    assert crop(37, "heldout").window != first.window
    assert first.image.shape == (64, 64, 3) and first.image.dtype == np.uint8


def test_heldout_windows_never_share_a_centre_cell_with_training():
    train = [crop(i, "train") for i in range(160)]
    heldout = [crop(i, "heldout") for i in range(160)]
    assert not {centre_cell(c) for c in train} & {centre_cell(c) for c in heldout}
    photographs = load_photographs()
    assert all(split_of(photographs[c.photograph], c.window) == "heldout" for c in heldout)


def test_both_splits_show_most_objects():
    for split in ("train", "heldout"):
        seen = {o.name for i in range(480) for o in crop(i, split).objects}
        assert len(seen) >= 0.7 * len(object_names()), (split, set(object_names()) - seen)


def test_captions_are_short_and_name_the_visible_objects():
    for index in range(160):
        sample = crop(index, "train")
        captions = sample.captions
        lengths = [len(text.split()) for text in (captions.coarse, captions.middle, captions.fine)]
        assert all(n <= limit for n, limit in zip(lengths, (5, 8, 10), strict=True)), captions
        assert captions.coarse == captions.coarse.lower()
        names = list(dict.fromkeys(o.name for o in sample.objects))[:3]
        assert all(name in captions.coarse for name in names)
        for item in sample.objects:
            x0, y0, x1, y1 = item.box
            assert 0 <= x0 < x1 <= 64 and 0 <= y0 < y1 <= 64 and (x1 - x0) * (y1 - y0) >= 0.04 * 64**2


def test_a_flip_mirrors_pixels_and_boxes():
    photograph = load_photographs()["motorcycle"]
    sample = next(c for c in (crop(i, "train") for i in range(12, 2000, 16)) if c.objects)
    plain = cut(photograph, replace(sample.window, flip=False))
    mirror = cut(photograph, replace(sample.window, flip=True))
    assert np.array_equal(plain.image[:, ::-1], mirror.image)
    for a, b in zip(plain.objects, mirror.objects, strict=True):
        assert b.box == pytest.approx((64 - a.box[2], a.box[1], 64 - a.box[0], a.box[3]))


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="'train' or 'heldout'"):
        crop(0, "test")
    with pytest.raises(ValueError, match="index is -1"):
        crop(-1, "train")
