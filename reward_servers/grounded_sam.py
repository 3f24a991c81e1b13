"""Grounded-SAM: GroundingDINO finds named objects, SAM measures them.

The published demo takes its names from a tagger (RAM); here they come from a vocabulary. Thresholds and the order of
the steps are those of IDEA-Research/Grounded-Segment-Anything, ``automatic_label_ram_demo.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from reward_servers.contract import DetectedObject, Detection, RewardServerError
from reward_servers.detection import (
    MainRule,
    chunk_vocabulary,
    load_vocabulary,
    main_objects,
    nms,
    phrase_spans,
    prompt_text,
    whole_phrase,
)


@dataclass(frozen=True)
class GroundedSamConfig:
    """How objects are found.

    Attributes:
        detector: directory (or hub name) of a GroundingDino or MM-GroundingDino checkpoint with its processor.
        segmenter: directory (or hub name) of a Sam checkpoint with its processor.
        vocabulary: names to look for, or the path of a file with one name a line.
        box_threshold: lowest score of a detection.
        text_threshold: lowest probability of a token that names it.
        nms_iou: of two boxes that overlap more than this the better one is kept, whatever their names.
        main: which objects count as main.
        device: torch device of both models.
        threads: CPU threads of this process.
    """

    detector: str
    segmenter: str
    vocabulary: tuple[str, ...] | str
    box_threshold: float = 0.25
    text_threshold: float = 0.2
    nms_iou: float = 0.5
    main: MainRule = field(default_factory=MainRule)
    device: str = "cpu"
    threads: int = 1

    def __post_init__(self) -> None:
        for name in ("box_threshold", "text_threshold", "nms_iou"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"grounded_sam.{name} must lie in [0, 1], got {getattr(self, name)}")
        if self.threads < 1:
            raise ValueError(f"grounded_sam.threads must be at least 1, got {self.threads}")


@dataclass(frozen=True)
class _Prompt:
    names: tuple[str, ...]
    ids: torch.Tensor
    spans: list[tuple[int, int]]


@dataclass(frozen=True, eq=False)
class Boxes:
    """Detections of one image: names, scores float [N] and boxes float [N, 4] (pixels), best first."""

    names: tuple[str, ...]
    scores: torch.Tensor
    boxes: torch.Tensor


class Detector:
    """GroundingDINO with a fixed vocabulary.

    Raises:
        ValueError: a bad vocabulary, or a name with a word that the checkpoint's tokenizer does not know.
        RewardServerError: the checkpoint cannot be loaded.
    """

    def __init__(self, config: GroundedSamConfig) -> None:
        from transformers import AutoModelForZeroShotObjectDetection, AutoProcessor

        self._config = config
        self._processor = _load(AutoProcessor, config.detector, "detector")
        model = _load(AutoModelForZeroShotObjectDetection, config.detector, "detector", dtype=torch.float32)
        self._model = model.to(config.device).eval()
        self._prompts = self._tokenise(load_vocabulary(config.vocabulary))

    @torch.inference_mode()
    def detect(self, images: Sequence[np.ndarray]) -> list[Boxes]:
        """Named boxes of images uint8 [H, W, 3], all of one size."""
        pixels = self._processor.image_processor(images=list(images), return_tensors="pt").to(self._config.device)
        found = [self._run(pixels, prompt) for prompt in self._prompts]
        height, width = images[0].shape[:2]
        scale = torch.tensor([width, height, width, height], dtype=torch.float32)
        return [self._merge([chunk[i] for chunk in found], scale) for i in range(len(images))]

    def _tokenise(self, names: tuple[str, ...]) -> list[_Prompt]:
        tokenizer = self._processor.tokenizer
        ids = {name: tokenizer(name, add_special_tokens=False).input_ids for name in names}
        unknown = [name for name in names if tokenizer.unk_token_id in ids[name]]
        if unknown:
            raise ValueError(
                f"grounded_sam.vocabulary: the tokenizer of {self._config.detector} does not know {', '.join(unknown)}"
            )
        full_stop = tokenizer.convert_tokens_to_ids(".")
        prompts = []
        for chunk in chunk_vocabulary(names, lambda name: len(ids[name]), self._model.config.max_text_len):
            tokens = tokenizer(prompt_text(chunk), return_tensors="pt").input_ids
            prompts.append(_Prompt(chunk, tokens, phrase_spans(tokens[0].tolist(), full_stop)))
        return prompts

    def _run(self, pixels: Any, prompt: _Prompt) -> list[list[tuple[str, float, torch.Tensor]]]:
        """Per image: name, score and box (cx, cy, w, h as shares of the image) of every query that names something."""
        count = len(pixels["pixel_values"])
        outputs = self._model(**pixels, input_ids=prompt.ids.expand(count, -1).to(self._config.device))
        probabilities, boxes = outputs.logits.sigmoid().float().cpu(), outputs.pred_boxes.float().cpu()
        found = []
        for of_image, places in zip(probabilities, boxes, strict=True):
            likely = (of_image.max(-1).values > self._config.box_threshold).nonzero()[:, 0].tolist()
            named = [(q, self._name(of_image[q], prompt)) for q in likely]
            found.append([(*hit, places[q]) for q, hit in named if hit is not None])
        return found

    def _name(self, probabilities: torch.Tensor, prompt: _Prompt) -> tuple[str, float] | None:
        hit = whole_phrase(probabilities, prompt.spans, self._config.box_threshold, self._config.text_threshold)
        return None if hit is None else (prompt.names[hit[0]], hit[1])

    def _merge(self, chunks: list[list[tuple[str, float, torch.Tensor]]], scale: torch.Tensor) -> Boxes:
        """All prompts' boxes of one image, without those that overlap a better one."""
        found = [hit for chunk in chunks for hit in chunk]
        if not found:
            return Boxes((), torch.zeros(0), torch.zeros(0, 4))
        names, scores = [name for name, _, _ in found], torch.tensor([score for _, score, _ in found])
        centred = torch.stack([place for _, _, place in found])
        low, high = centred[:, :2] - centred[:, 2:] / 2, centred[:, :2] + centred[:, 2:] / 2
        boxes = torch.cat([low, high], dim=1).clamp(0, 1) * scale
        kept = nms(boxes, scores, self._config.nms_iou)
        return Boxes(tuple(names[i] for i in kept), scores[kept], boxes[kept])


class Segmenter:
    """SAM prompted with boxes.

    Raises:
        RewardServerError: the checkpoint cannot be loaded.
    """

    def __init__(self, checkpoint: str, device: str = "cpu") -> None:
        from transformers import SamModel, SamProcessor

        self._device = device
        self._processor = _load(SamProcessor, checkpoint, "segmenter")
        self._model = _load(SamModel, checkpoint, "segmenter", dtype=torch.float32).to(device).eval()

    @torch.inference_mode()
    def masks(self, images: Sequence[np.ndarray], boxes: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Masks bool [N, H, W] for the boxes float [N, 4] (pixels, N >= 1) of each image."""
        longest = max(len(b) for b in boxes)
        # The processor wants as many boxes for every image; the last one is repeated and its masks are dropped.
        padded = [torch.cat([b, b[-1:].expand(longest - len(b), -1)]) for b in boxes]
        inputs = self._processor(images=list(images), input_boxes=[b.tolist() for b in padded], return_tensors="pt")
        outputs = self._model(
            pixel_values=inputs["pixel_values"].to(self._device),
            input_boxes=inputs["input_boxes"].float().to(self._device),
            multimask_output=False,
        )
        found = self._processor.post_process_masks(
            outputs.pred_masks.cpu(), inputs["original_sizes"], inputs["reshaped_input_sizes"]
        )
        return [mask[: len(b), 0] for mask, b in zip(found, boxes, strict=True)]


class GroundedSam:
    """Objects of photographs, with their mask areas. Usable in any process, without Ray.

    Raises:
        ValueError, RewardServerError: as :class:`Detector` and :class:`Segmenter`.
    """

    def __init__(self, config: GroundedSamConfig) -> None:
        torch.set_num_threads(config.threads)
        self.config = config
        self._detector = Detector(config)
        self._segmenter = Segmenter(config.segmenter, config.device)

    def detect(self, images: Sequence[np.ndarray]) -> list[Detection]:
        """Objects of each image uint8 [H, W, 3] RGB; the models' processors resize them.

        Images of one size make one batch; padding to a common size would change their scores.

        Raises:
            ValueError: an image is not uint8 RGB.
        """
        for image in images:
            check_image(image)
        answers: list[Detection | None] = [None] * len(images)
        for shape in dict.fromkeys(image.shape for image in images):
            places = [i for i, image in enumerate(images) if image.shape == shape]
            for place, answer in zip(places, self._detect([images[i] for i in places]), strict=True):
                answers[place] = answer
        return [answer for answer in answers if answer is not None]

    def _detect(self, images: list[np.ndarray]) -> list[Detection]:
        found = self._detector.detect(images)
        some = [i for i, boxes in enumerate(found) if boxes.names]
        masks = self._segmenter.masks([images[i] for i in some], [found[i].boxes for i in some]) if some else []
        areas = {i: mask.float().mean((1, 2)).tolist() for i, mask in zip(some, masks, strict=True)}
        return [self._answer(boxes, areas.get(i, [])) for i, boxes in enumerate(found)]

    def _answer(self, found: Boxes, areas: list[float]) -> Detection:
        objects = tuple(
            DetectedObject(name, score, (box[0], box[1], box[2], box[3]), area)
            for name, score, box, area in zip(
                found.names, found.scores.tolist(), found.boxes.tolist(), areas, strict=True
            )
        )
        return Detection(objects, main_objects(objects, self.config.main))


def check_image(image: np.ndarray) -> None:
    """Raises ValueError unless the image is uint8 [H, W, 3] with H, W >= 1."""
    if not isinstance(image, np.ndarray):
        raise ValueError(f"an image must be a numpy array, got {type(image).__name__}")
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or image.size == 0:
        raise ValueError(f"an image must be uint8 [H, W, 3], got {image.dtype} {list(image.shape)}")


def _load(factory: Any, checkpoint: str, role: str, **options: Any) -> Any:
    try:
        return factory.from_pretrained(checkpoint, **options)
    except (OSError, ValueError) as error:
        raise RewardServerError(f"grounded_sam.{role}: cannot load {checkpoint!r}: {error}") from error
