"""Pieces of the detector's training: labels, losses, balance of the batches."""

from collections import Counter

import numpy as np
import pytest
import torch

from toy.detection_examples import SIZE, Batches, Example, crop_examples, degraded, scene_examples
from toy.train_grounding_dino import _owners, build_model, build_processor, giou, targets

pytestmark = pytest.mark.unit


def test_targets_are_places_in_the_prompt_and_centred_boxes():
    image = np.zeros((SIZE, SIZE, 3), np.uint8)
    batch = [Example(image, ("cup", "eye"), ((0, 0, 32, 16), (1, 1, 2, 2))), Example(image, (), ())]
    first, second = targets(batch, ["cat", "cup"])
    assert first["class_labels"].tolist() == [1]  # the eye is not asked for
    assert first["boxes"].tolist() == [[0.25, 0.125, 0.5, 0.25]]
    assert second["boxes"].shape == (0, 4)


def test_giou_has_known_values():
    a = torch.tensor([[0.5, 0.5, 1.0, 1.0]] * 3)
    b = torch.tensor([[0.5, 0.5, 1.0, 1.0], [0.25, 0.5, 0.5, 1.0], [2.5, 0.5, 1.0, 1.0]])
    # Equal; half inside; apart: hull 3, union 2.
    assert giou(a, b).tolist() == pytest.approx([1.0, 0.5, -1 / 3])


def test_a_position_belongs_to_the_smallest_object_around_it():
    boxes = torch.tensor([[0.5, 0.5, 0.8, 0.8], [0.5, 0.5, 0.3, 0.3]])
    positions = torch.tensor([[0.5, 0.5], [0.35, 0.5], [0.05, 0.5]])
    assert _owners(positions, boxes).tolist() == [1, 0, -1]
    assert _owners(positions, torch.zeros(0, 4)).tolist() == [-1, -1, -1]


def test_a_new_model_finds_almost_nothing():
    """The prior: most queries of a random model score below the box threshold."""
    torch.manual_seed(0)
    processor = build_processor(["cat", "cup"])
    model = build_model(len(processor.tokenizer)).eval()
    inputs = processor(images=[np.zeros((16, 16, 3), np.uint8)], text="cat. cup.", return_tensors="pt")
    with torch.no_grad():
        scores = model(**inputs).logits.sigmoid().max(-1).values
    assert scores.median() < 0.25


def test_batches_are_seeded_and_balance_rare_objects():
    scenes, crops = scene_examples(20, "train"), crop_examples(400, "train")
    first, again = (Batches(scenes, crops, 3) for _ in range(2))
    for a, b in zip(first.draw(8), again.draw(8), strict=True):
        assert np.array_equal(a.image, b.image) and a.boxes == b.boxes
    assert first.prompt(["cat", "cup", "eye", "man", "flag"]) == again.prompt(["cat", "cup", "eye", "man", "flag"])

    drawn = Batches(scenes, crops, 0).draw(400, scene_share=0.0, degraded_share=0.0)
    assert 0.15 < np.mean([not e.names for e in drawn]) < 0.35
    natural = Counter(name for e in crops for name in set(e.names))
    balanced = Counter(name for e in drawn for name in set(e.names))
    assert balanced["helmet"] / balanced["coin"] > 2 * natural["helmet"] / natural["coin"]


def test_degraded_examples_keep_their_objects_at_a_quarter_of_the_size():
    (scene,) = scene_examples(1, "heldout")
    (small,) = degraded([scene], 0)
    assert small.image.shape == (16, 16, 3) and small.names == scene.names
    assert np.array(small.boxes) * 4 == pytest.approx(np.array(scene.boxes))
