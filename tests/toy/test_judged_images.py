"""Groups that train the visual expert: made as their scores say."""

from __future__ import annotations

import numpy as np
import pytest

from toy.judged_images import CORRUPTIONS, SCORES, corrupt, graded_group, judged_group, psnr_db
from toy.photographs import crop

pytestmark = pytest.mark.unit


def test_same_arguments_give_the_same_group_and_splits_differ() -> None:
    a, b = judged_group(3, "train", 4), judged_group(3, "train", 4)
    np.testing.assert_array_equal(a.images, b.images)
    np.testing.assert_array_equal(a.scores, b.scores)
    assert not np.array_equal(a.truth, judged_group(3, "heldout", 4).truth)


def test_shapes_and_ranges() -> None:
    group = judged_group(7, "train", 6)
    assert group.lr.shape == (16, 16, 3) and group.images.shape == (6, 64, 64, 3) and group.images.dtype == np.uint8
    assert group.scores.shape == (6, len(SCORES)) and group.scores.min() >= 0 and group.scores.max() <= 10
    assert np.allclose(group.psnr, [psnr_db(image, group.truth) for image in group.images])


@pytest.mark.parametrize("kind", sorted(CORRUPTIONS))
def test_every_corruption_gets_worse_with_severity(kind: str) -> None:
    """More severity, lower PSNR and lower scores, on the mean over crops."""
    levels = np.array([0.0, 0.25, 0.5, 0.75, 1.0])
    groups = [graded_group(index, "heldout", (kind,) * 5, levels) for index in range(8)]
    psnr, scores = (np.mean([getattr(g, name) for g in groups], axis=0) for name in ("psnr", "scores"))
    assert psnr[0] == 60 and np.allclose(scores[0], 10)
    assert (np.diff(psnr) < 0).all()
    assert (np.diff(scores.mean(axis=1)) < 0).all()


def test_pictures_without_content_have_no_quality() -> None:
    groups = [judged_group(index, "train", 8) for index in range(12)]
    for kind in ("flat", "static"):
        scores = np.concatenate([g.scores[[k == kind for k in g.kinds]] for g in groups])
        assert len(scores) > 0
        assert (scores[:, :2] == 0).all() and scores[:, 2].mean() < 5


def test_another_crop_is_inconsistent_but_not_bad() -> None:
    groups = [judged_group(index, "train", 8) for index in range(12)]
    other = np.concatenate([g.scores[[k == "other" for k in g.kinds]] for g in groups])
    assert other[:, 2].mean() < 1.5 < 4 < other[:, 0].mean()


def test_weak_policy_range_is_well_represented() -> None:
    psnr = np.concatenate([judged_group(index, "train", 8).psnr for index in range(20)])
    assert np.mean((psnr > 14) & (psnr < 24)) > 0.4


def test_corrupt_leaves_its_input_alone() -> None:
    image = crop(0, "train").image
    before = image.copy()
    for kind in CORRUPTIONS:
        corrupt(image, kind, 1.0, np.random.default_rng(0))
    np.testing.assert_array_equal(image, before)


def test_quality_takes_in_the_severity_where_it_is_known() -> None:
    group = graded_group(1, "heldout", ("blur", "jpeg", "codes"), np.array([0.2, 0.5, 0.9]))
    distance = 5 * group.cells[..., 0].mean(axis=1).clip(0) + 5 * ((group.psnr - 12) / 28).clip(0, 1)
    np.testing.assert_allclose(group.scores[:, 0], (distance + 10 * (1 - group.severity)) / 2)


def test_the_severity_of_an_image_moved_to_a_psnr_or_of_another_crop_is_not_known() -> None:
    groups = [judged_group(index, "train", 8) for index in range(20)]
    kinds, severity = np.concatenate([g.kinds for g in groups]), np.concatenate([g.severity for g in groups])
    assert np.isnan(severity[kinds == "other"]).all()
    known = severity[~np.isin(kinds, ("other", "truth", "flat", "static"))]
    assert 0.2 < np.isnan(known).mean() < 0.7 and np.nanmin(known) > 0 and np.nanmax(known) <= 1
