"""The shipped detector and segmenter: sizes, offline loading and floors of held-out quality."""

from pathlib import Path

import pytest
import torch

from reward_servers.grounded_sam import Boxes, Detector, GroundedSamConfig, Segmenter
from toy.detection_examples import Example, scene_examples
from toy.detector_quality import matches, quality
from toy.photographs import object_names
from toy.train_sam import heldout_iou

pytestmark = pytest.mark.engine

WEIGHTS = Path(__file__).parents[2] / "toy" / "weights"
GROUNDING_DINO, SAM = str(WEIGHTS / "grounding_dino"), str(WEIGHTS / "sam")


@pytest.fixture(scope="module")
def detector():
    torch.set_num_threads(1)
    return Detector(GroundedSamConfig(GROUNDING_DINO, SAM, tuple(object_names())))


@pytest.mark.parametrize("folder", [GROUNDING_DINO, SAM])
def test_checkpoints_are_small_safetensors_with_a_card(folder):
    files = {path.name: path.stat().st_size for path in Path(folder).iterdir()}
    assert sum(size for name, size in files.items() if name.endswith(".safetensors")) <= 1.5 * 2**20
    assert "README.md" in files and "config.json" in files
    assert not [name for name in files if name.endswith((".bin", ".pt", ".pth", ".pkl"))]


def test_processors_load_as_published_ones():
    from transformers import AutoProcessor, GroundingDinoProcessor, SamProcessor

    processor = AutoProcessor.from_pretrained(GROUNDING_DINO)
    assert isinstance(processor, GroundingDinoProcessor)
    assert isinstance(SamProcessor.from_pretrained(SAM), SamProcessor)
    ids = processor.tokenizer("cat. face.").input_ids
    assert (ids[0], ids[2], ids[4], ids[-1]) == (101, 1012, 1012, 102)
    assert processor.tokenizer("?").input_ids[1] == 1029 and processor.tokenizer.unk_token_id not in ids


def test_detector_finds_the_objects_of_heldout_scenes(detector):
    """Recall of at least 0.8 at precision of at least 0.8, name and place (IoU 0.5) both right."""
    found = quality(detector, scene_examples(128, "heldout"))
    assert found.boxes.recall >= 0.8 and found.boxes.precision >= 0.8, found
    assert found.names.recall >= 0.8 and found.names.precision >= 0.8, found


def test_segmenter_covers_heldout_objects():
    torch.set_num_threads(1)
    found = heldout_iou(Segmenter(SAM), 64)
    assert found["clean"] >= 0.7 and found["degraded"] >= 0.65, found


def test_a_detection_matches_one_object_of_its_name_and_place():
    truth = Example(None, ("cat", "cat", "cup"), ((0, 0, 10, 10), (20, 20, 30, 30), (40, 40, 60, 60)))

    def found(*named):
        return Boxes(tuple(n for n, _ in named), torch.ones(len(named)), torch.tensor([b for _, b in named]).float())

    assert matches(found(("cat", (0, 0, 10, 10)), ("cat", (21, 20, 30, 30)), ("cup", (40, 40, 60, 60))), truth) == 3
    assert matches(found(("cat", (0, 0, 10, 10)), ("cat", (1, 0, 10, 10))), truth) == 1
    assert matches(found(("cup", (0, 0, 10, 10)), ("cat", (0, 0, 4, 10))), truth) == 0
