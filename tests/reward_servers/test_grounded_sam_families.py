"""The other detectors and segmenters that a configuration may name, with small random weights made here."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch

from reward_servers.detection import chunk_vocabulary, nms
from reward_servers.grounded_sam import Detector, GroundedSam, GroundedSamConfig, Segmenter
from toy.detection_examples import scene_examples
from toy.photographs import object_names
from toy.train_grounding_dino import WEIGHTS as GROUNDING_DINO
from toy.train_sam import WEIGHTS as SAM

pytestmark = pytest.mark.engine

NAMES = tuple(object_names())
SHORT_PROMPT = 20
"""Tokens that the MM-GroundingDINO of these tests reads: its vocabulary needs several prompts."""


def config(detector, segmenter=SAM, **changes):
    # Random weights are sure of nothing: every query names something at these thresholds.
    return GroundedSamConfig(
        str(detector), str(segmenter), NAMES, **{"box_threshold": 0, "text_threshold": 0} | changes
    )


@pytest.fixture(scope="module")
def mm_grounding_dino(tmp_path_factory):
    """The toy detector's sizes and processor, as MM-GroundingDINO."""
    from transformers import AutoProcessor, MMGroundingDinoConfig, MMGroundingDinoForObjectDetection

    folder = tmp_path_factory.mktemp("mm_grounding_dino")
    settings = json.loads((GROUNDING_DINO / "config.json").read_text())
    for key in ("architectures", "model_type", "transformers_version", "dtype"):
        del settings[key]
    torch.manual_seed(0)
    model = MMGroundingDinoForObjectDetection(MMGroundingDinoConfig(**settings | {"max_text_len": SHORT_PROMPT}))
    for weight in model.class_embed.parameters():
        torch.nn.init.normal_(weight, std=3.0)
    model.save_pretrained(folder)
    AutoProcessor.from_pretrained(GROUNDING_DINO).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def sam2(tmp_path_factory):
    from transformers import (
        Sam2Config,
        Sam2HieraDetConfig,
        Sam2ImageProcessor,
        Sam2MaskDecoderConfig,
        Sam2Model,
        Sam2Processor,
        Sam2PromptEncoderConfig,
        Sam2VisionConfig,
    )

    folder = tmp_path_factory.mktemp("sam2")
    backbone = Sam2HieraDetConfig(
        hidden_size=16,
        image_size=[64, 64],
        window_positional_embedding_background_size=[4, 4],
        blocks_per_stage=[1, 1, 2, 1],
        embed_dim_per_stage=[16, 32, 64, 128],
        num_attention_heads_per_stage=[1, 1, 2, 2],
        window_size_per_stage=[4, 4, 4, 2],
        global_attention_blocks=[3],
    )
    vision = Sam2VisionConfig(
        backbone_config=backbone.to_dict(),
        backbone_channel_list=[128, 64, 32, 16],
        backbone_feature_sizes=[[16, 16], [8, 8], [4, 4]],
        fpn_hidden_size=32,
    )
    prompts = Sam2PromptEncoderConfig(hidden_size=32, image_size=64, patch_size=16)
    masks = Sam2MaskDecoderConfig(hidden_size=32, mlp_dim=64, num_attention_heads=2, iou_head_hidden_dim=32)
    torch.manual_seed(0)
    model = Sam2Model(
        Sam2Config(
            vision_config=vision.to_dict(),
            prompt_encoder_config=prompts.to_dict(),
            mask_decoder_config=masks.to_dict(),
        )
    )
    model.save_pretrained(folder)
    size = {"height": 64, "width": 64}
    processor = Sam2Processor(Sam2ImageProcessor(size=size, mask_size={"height": 16, "width": 16}))
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def images():
    return [scene.image for scene in scene_examples(3, "heldout")]


def test_mm_grounding_dino_finds_names_of_the_vocabulary(mm_grounding_dino, images):
    detector = Detector(config(mm_grounding_dino, nms_iou=1.0))
    assert type(detector._model).__name__ == "MMGroundingDinoForObjectDetection"
    found = detector.detect(images)
    for boxes in found:
        assert len(boxes.names) == 16 * len(detector._prompts), "every query of every prompt"
        assert set(boxes.names) <= set(NAMES) and len(set(boxes.names)) > 1
        assert bool((boxes.boxes >= 0).all()) and bool((boxes.boxes <= 64).all())
    again = detector.detect(images)
    assert [b.scores.tolist() for b in again] == [b.scores.tolist() for b in found]


def test_mm_grounding_dinos_long_vocabulary_is_split_and_merged(mm_grounding_dino, images):
    """The merged answer is NMS over what each prompt finds alone, so no prompt sees or hides another's names."""
    detector = Detector(config(mm_grounding_dino))
    chunks = chunk_vocabulary(NAMES, lambda _: 1, SHORT_PROMPT)
    assert [prompt.names for prompt in detector._prompts] == chunks and len(chunks) > 1
    assert all(prompt.ids.shape[1] <= SHORT_PROMPT for prompt in detector._prompts)
    merged = detector.detect(images[:1])[0]
    alone = [
        detector.with_config(config(mm_grounding_dino, nms_iou=1.0)).detect(images[:1], names)[0] for names in chunks
    ]
    boxes, scores = torch.cat([a.boxes for a in alone]), torch.cat([a.scores for a in alone])
    names = [name for a in alone for name in a.names]
    kept = nms(boxes, scores, 0.5)
    assert sorted(merged.names) == sorted(names[i] for i in kept)
    assert merged.scores.tolist() == pytest.approx([float(scores[i]) for i in kept])


def test_sam2_gives_masks_of_every_images_own_size(sam2, images):
    segmenter = Segmenter(str(sam2))
    assert type(segmenter._model).__name__ == "Sam2Model"
    wide = np.concatenate([images[0], images[1]], axis=1)
    boxes = [torch.tensor([[4.0, 4, 30, 30], [10.0, 20, 50, 60]]), torch.tensor([[70.0, 5, 120, 60]])]
    first, second = segmenter.masks([images[2], wide], boxes)
    assert first.shape == (2, 64, 64) and second.shape == (1, 64, 128)
    assert first.dtype == torch.bool and first.any() and not first.all()
    (alone,) = segmenter.masks([wide], boxes[1:])
    assert torch.equal(alone, second), "masks of an image do not depend on the others"


def test_published_sam2_checkpoints_call_themselves_sam2_video(sam2, tmp_path):
    shutil.copytree(sam2, tmp_path / "video")
    path = tmp_path / "video" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "sam2_video"}))
    image, box = np.full((64, 64, 3), 90, np.uint8), [torch.tensor([[4.0, 4, 30, 30]])]
    (video,), (plain,) = (Segmenter(str(folder)).masks([image], box) for folder in (tmp_path / "video", sam2))
    assert torch.equal(video, plain)


def test_grounded_sam_of_both_newer_models(mm_grounding_dino, sam2, images):
    answers = GroundedSam(config(mm_grounding_dino, sam2)).detect(images, masks=True)
    objects = [item for answer in answers for item in answer.objects]
    assert objects
    for item in objects:
        assert item.mask.shape == (64, 64) and item.mask.mean() == pytest.approx(item.mask_area)


@pytest.mark.parametrize(
    "role, source, known", [("detector", SAM, "mm-grounding-dino"), ("segmenter", GROUNDING_DINO, "sam, sam2")]
)
def test_a_checkpoint_of_another_type_is_refused(role, source, known):
    folders = {"detector": str(GROUNDING_DINO), "segmenter": str(SAM)} | {role: str(source)}
    with pytest.raises(ValueError, match=rf"grounded_sam\.{role}: .* is of type .*{known}"):
        GroundedSam(GroundedSamConfig(vocabulary=NAMES, **folders))
