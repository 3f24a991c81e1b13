"""Grounded-SAM as a plain class, with the shipped toy weights."""

import json
import shutil

import numpy as np
import pytest
import torch

from reward_servers.contract import RewardServerError
from reward_servers.detection import MainRule
from reward_servers.grounded_sam import Detector, GroundedSam, GroundedSamConfig
from toy.detection_examples import degraded, scene_examples
from toy.photographs import object_names
from toy.train_grounding_dino import WEIGHTS as GROUNDING_DINO
from toy.train_sam import WEIGHTS as SAM

pytestmark = pytest.mark.unit

NAMES = tuple(object_names())


def config(**changes):
    return GroundedSamConfig(**{"detector": str(GROUNDING_DINO), "segmenter": str(SAM), "vocabulary": NAMES} | changes)


@pytest.fixture(scope="module")
def model():
    return GroundedSam(config())


@pytest.fixture(scope="module")
def scenes():
    return scene_examples(12, "heldout")


def test_objects_have_scores_boxes_and_areas_in_range(model, scenes):
    answers = model.detect([scene.image for scene in scenes])
    objects = [item for answer in answers for item in answer.objects]
    assert len(objects) >= 8
    for item in objects:
        x0, y0, x1, y1 = item.box
        assert item.name in NAMES and 0.25 < item.score <= 1
        assert 0 <= x0 < x1 <= 64 and 0 <= y0 < y1 <= 64
        # The mask of a box is inside it, up to a cell of the small segmenter (4 pixels) on each side.
        assert 0 < item.mask_area <= (x1 - x0 + 8) * (y1 - y0 + 8) / 64**2
    for answer in answers:
        assert [item.score for item in answer.objects] == sorted((i.score for i in answer.objects), reverse=True)
        assert set(answer.main) <= {item.name for item in answer.objects} and len(answer.main) <= 3


def test_boxes_are_in_pixels_of_the_image_that_was_sent(model, scenes):
    large = np.repeat(np.repeat(scenes[0].image, 4, axis=0), 4, axis=1)
    (small_answer,), (large_answer,) = model.detect([scenes[0].image]), model.detect([large])
    assert small_answer.main and small_answer.main[0] == large_answer.main[0]
    first, same = (
        small_answer.objects[0],
        next(o for o in large_answer.objects if o.name == small_answer.objects[0].name),
    )
    # Resampling moves a small detector's boxes by some pixels; boxes in the wrong unit would be off by a factor of 4.
    assert np.allclose(np.array(same.box) / 4, first.box, atol=8)
    assert same.mask_area == pytest.approx(first.mask_area, abs=0.08)


def test_images_of_several_sizes_are_answered_in_order_as_if_alone(model, scenes):
    lr = degraded(scenes, 0)
    mixed = [scenes[0].image, lr[1].image, scenes[2].image, lr[3].image, scenes[4].image]
    together, alone = model.detect(mixed), [model.detect([image])[0] for image in mixed]
    assert [[o.name for o in a.objects] for a in together] == [[o.name for o in a.objects] for a in alone]
    for a, b in zip(together, alone, strict=True):
        assert [o.score for o in a.objects] == pytest.approx([o.score for o in b.objects], abs=1e-5)
    assert model.detect([]) == []


def test_equal_calls_give_equal_answers(model, scenes):
    image = scenes[1].image
    assert model.detect([image]) == model.detect([image.copy()]) == GroundedSam(config()).detect([image])


def test_a_plain_image_has_no_objects(model):
    answer = model.detect([np.full((16, 16, 3), 128, np.uint8)])[0]
    assert answer.objects == () and answer.main == ()


def test_a_long_vocabulary_is_split_into_prompts_and_merged(tmp_path, scenes, model):
    short = tmp_path / "short"
    shutil.copytree(GROUNDING_DINO, short)
    settings = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps(settings | {"max_text_len": 20}))
    detector = Detector(config(detector=str(short)))
    assert [len(prompt.names) for prompt in detector._prompts] == [9, 9, 3]
    images = [scene.image for scene in scenes]
    split = [set(boxes.names) for boxes in detector.detect(images)]
    whole = [{o.name for o in answer.objects} for answer in model.detect(images)]
    # Other names in the prompt change the scores a little, not the objects.
    agree = sum(len(a & b) for a, b in zip(split, whole, strict=True))
    assert agree >= 0.8 * sum(len(b) for b in whole)


def test_the_vocabulary_limits_what_is_found(scenes):
    found = GroundedSam(config(vocabulary=("cat",))).detect([scene.image for scene in scenes])
    assert {o.name for answer in found for o in answer.objects} <= {"cat"}


def test_masks_come_on_request_and_have_the_area_answered(model, scenes):
    (plain,), (with_masks,) = model.detect([scenes[0].image]), model.detect([scenes[0].image], masks=True)
    assert plain == with_masks and plain.objects and not any(item.mask is not None for item in plain.objects)
    for item in with_masks.objects:
        assert item.mask.shape == (64, 64) and item.mask.dtype == bool
        assert item.mask.mean() == pytest.approx(item.mask_area, abs=1e-6)


def test_each_image_may_bring_its_own_names(model, scenes):
    images = [scene.image for scene in scenes[:3]]
    (usual,) = model.detect(images[:1])
    name = usual.objects[0].name
    mixed = model.detect(images, names=[[name.upper()], None, ["galaxy", "man"]])
    assert {item.name for item in mixed[0].objects} == {name}
    assert mixed[1] == model.detect(images[1:2])[0]
    assert {item.name for item in mixed[2].objects} <= {"galaxy", "man"}
    assert mixed[0] == GroundedSam(config(vocabulary=(name,))).detect(images[:1])[0]
    assert model.detect_all([(images[0], True, [name]), (images[1], False, None)]) == mixed[:2]


@pytest.mark.parametrize(
    "names, words",
    [
        ([["cat"], ["cat"]], "one entry per image"),
        (["cat"], "must be a list of names"),
        ([[3]], "must be a list of names"),
        ([[]], "names holds no name"),
        ([["a. b"]], "'a. b'"),
        ([["zebra"]], "does not know zebra"),
    ],
)
def test_names_that_cannot_be_looked_for_are_refused(model, scenes, names, words):
    with pytest.raises(ValueError, match=words):
        model.detect([scenes[0].image], names=names)


def test_names_can_be_checked_before_they_spoil_a_batch(model):
    model.check_names(["Cat"])
    with pytest.raises(ValueError, match="does not know zebra"):
        model.check_names(["zebra"])


def test_settings_change_live_and_fall_back_to_those_of_the_start(scenes):
    images = [scene.image for scene in scenes[:3]]
    server = GroundedSam(config())
    usual = server.detect(images)
    server.reconfigure({"vocabulary": ["cat"], "box_threshold": 0.5, "main": {"max_count": 1}})
    fresh = GroundedSam(config(vocabulary=("cat",), box_threshold=0.5, main=MainRule(max_count=1)))
    assert server.detect(images) == fresh.detect(images) != usual
    server.reconfigure({"main": {"min_area": 1.0}})
    answers = server.detect(images)
    assert [a.objects for a in answers] == [a.objects for a in usual] and not any(a.main for a in answers)
    server.reconfigure({})
    assert server.detect(images) == usual


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"box_threshold": 0.9, "detector": "x"}, r"grounded_sam\.detector is no live setting"),
        ({"box_threshold": 0.9, "colour": 1}, r"grounded_sam\.colour is no live setting"),
        ({"box_threshold": 0.9, "nms_iou": "0.5"}, r"grounded_sam\.nms_iou must lie in \[0, 1\], got '0.5'"),
        ({"box_threshold": 0.9, "main": {"max_count": 1.5}}, r"grounded_sam\.main\.max_count must be a whole number"),
        ({"box_threshold": 0.9, "main": {"area": 1}}, r"grounded_sam\.main\.area is no live setting"),
        ({"box_threshold": 0.9, "vocabulary": ["zebra"]}, "does not know zebra"),
        ({"box_threshold": 0.9, "vocabulary": 7}, r"grounded_sam\.vocabulary must be a list of names"),
    ],
)
def test_a_refused_change_changes_nothing(model, scenes, settings, words):
    before, answer = model.config, model.detect([scenes[0].image])
    with pytest.raises(ValueError, match=words):
        model.reconfigure(settings)
    assert model.config is before and model.detect([scenes[0].image]) == answer


def test_the_main_rule_is_applied(scenes):
    strict = GroundedSam(config(main=MainRule(min_area=1.0)))
    answers = strict.detect([scene.image for scene in scenes])
    assert any(answer.objects for answer in answers) and not any(answer.main for answer in answers)


@pytest.mark.parametrize(
    "image", [np.zeros((8, 8, 3), np.float32), np.zeros((8, 8), np.uint8), np.zeros((0, 8, 3), np.uint8), [[1]]]
)
def test_a_bad_image_is_refused(model, image):
    with pytest.raises(ValueError, match="an image must be"):
        model.detect([image])


def test_a_name_that_the_tokenizer_does_not_know_is_refused():
    with pytest.raises(ValueError, match="does not know zebra, tax office"):
        Detector(config(vocabulary=("cat", "zebra", "tax office")))


@pytest.mark.parametrize("role", ["detector", "segmenter"])
def test_a_missing_checkpoint_is_named(role):
    with pytest.raises(RewardServerError, match=f"grounded_sam.{role}: cannot load '/none/such'"):
        GroundedSam(config(**{role: "/none/such"}))


@pytest.mark.parametrize("key, value", [("box_threshold", 1.5), ("nms_iou", float("nan")), ("threads", 0)])
def test_an_impossible_setting_is_refused(key, value):
    with pytest.raises(ValueError, match=f"grounded_sam.{key}"):
        config(**{key: value})


def test_threads_are_set():
    GroundedSam(config(threads=1))
    assert torch.get_num_threads() == 1
