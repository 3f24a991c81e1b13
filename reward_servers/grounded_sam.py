"""Grounded-SAM: GroundingDINO finds named objects, SAM measures them.

The published demo takes its names from a tagger (RAM); here they come from a vocabulary, or with each image from a
tagger of the caller's choice. Thresholds and the order of the steps are those of
IDEA-Research/Grounded-Segment-Anything, ``automatic_label_ram_demo.py``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from tokenizers import Tokenizer

from reward_servers.checks import check_count, check_share
from reward_servers.contract import DetectedObject, Detection, RewardServerError
from reward_servers.detection import (
    MainRule,
    chunk_vocabulary,
    clean_names,
    load_vocabulary,
    main_objects,
    nms,
    phrase_spans,
    prompt_text,
    whole_phrase,
)
from reward_servers.live_settings import with_settings

DETECTORS = ("grounding-dino", "mm-grounding-dino")
SEGMENTERS = ("sam", "sam2", "sam2_video")
"""Model types of ``config.json``. Published Sam2 checkpoints are of type sam2_video and hold the image model too."""

MAX_TEXT_LEN = 256
"""Ids of a prompt where ``config.json`` does not say (transformers' GroundingDinoConfig)."""
LIVE = ("vocabulary", "box_threshold", "text_threshold", "nms_iou", "main")
"""Settings that :meth:`GroundedSam.reconfigure` changes."""

Request: TypeAlias = tuple[np.ndarray, bool, Sequence[str] | None]
"""Image uint8 [H, W, 3], whether its masks are wanted, names to look for (None: the vocabulary)."""


@dataclass(frozen=True)
class GroundedSamConfig:
    """How objects are found.

    Attributes:
        detector: directory (or hub name) of a GroundingDino or MM-GroundingDino checkpoint with its processor.
        segmenter: directory (or hub name) of a Sam or Sam2 checkpoint with its processor.
        vocabulary: names to look for, ``common`` for the shipped list, or the path of a file with one name a line.
        box_threshold: lowest score of a detection.
        text_threshold: lowest probability of a token that names it.
        nms_iou: of two boxes that overlap more than this the better one is kept, whatever their names.
        main: which objects count as main.
        device: torch device of both models.
        threads: CPU threads of this process.
    """

    detector: str
    segmenter: str
    vocabulary: Sequence[str] | str
    box_threshold: float = 0.25
    text_threshold: float = 0.2
    nms_iou: float = 0.5
    main: MainRule = field(default_factory=MainRule)
    device: str = "cpu"
    threads: int = 1

    def __post_init__(self) -> None:
        for name in ("box_threshold", "text_threshold", "nms_iou"):
            check_share(f"grounded_sam.{name}", getattr(self, name))
        check_count("grounded_sam.threads", self.threads)


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
    """GroundingDINO or MM-GroundingDINO, its thresholds and its vocabulary.

    Raises:
        ValueError: a bad vocabulary, a name with a word that the checkpoint's tokenizer does not know, or a checkpoint
            of another type than :data:`DETECTORS`.
        RewardServerError: the checkpoint cannot be loaded.
    """

    def __init__(self, config: GroundedSamConfig) -> None:
        from transformers import AutoModelForZeroShotObjectDetection, AutoProcessor

        self.config = config
        _check_type(config.detector, "detector", DETECTORS)
        self._processor = _load(AutoProcessor, config.detector, "detector")
        model = _load(AutoModelForZeroShotObjectDetection, config.detector, "detector", dtype=torch.float32)
        self._model = model.to(config.device).eval()
        self._prompts = self.prompts(load_vocabulary(config.vocabulary))

    def with_config(self, config: GroundedSamConfig) -> Detector:
        """The same model with other thresholds and another vocabulary; this detector stays as it is.

        Raises:
            ValueError: as the constructor.
        """
        other = copy(self)
        other.config = config
        other._prompts = other.prompts(load_vocabulary(config.vocabulary))
        return other

    @torch.inference_mode()
    def detect(self, images: Sequence[np.ndarray], names: tuple[str, ...] | None = None) -> list[Boxes]:
        """Named boxes of images uint8 [H, W, 3], all of one size.

        Args:
            images: at least one.
            names: of :func:`clean_names`, to look for in place of the vocabulary.

        Raises:
            ValueError: a name that the tokenizer does not know.
        """
        prompts = self._prompts if names is None else self.prompts(names)
        pixels = self._processor.image_processor(images=list(images), return_tensors="pt").to(self.config.device)
        found = [self._run(pixels, prompt) for prompt in prompts]
        height, width = images[0].shape[:2]
        scale = torch.tensor([width, height, width, height], dtype=torch.float32)
        return [self._merge([chunk[i] for chunk in found], scale) for i in range(len(images))]

    def prompts(self, names: tuple[str, ...]) -> list[_Prompt]:
        """Tokenised prompts that hold all names. Raises ValueError for one that the tokenizer does not know."""
        return _prompts(self.config.detector, self._processor.tokenizer, self._model.config.max_text_len, names)

    def _run(self, pixels: Any, prompt: _Prompt) -> list[list[tuple[str, float, torch.Tensor]]]:
        """Per image: name, score and box (cx, cy, w, h as shares of the image) of every query that names something."""
        count = len(pixels["pixel_values"])
        outputs = self._model(**pixels, input_ids=prompt.ids.expand(count, -1).to(self.config.device))
        probabilities, boxes = outputs.logits.sigmoid().float().cpu(), outputs.pred_boxes.float().cpu()
        found = []
        for of_image, places in zip(probabilities, boxes, strict=True):
            likely = (of_image.max(-1).values > self.config.box_threshold).nonzero()[:, 0].tolist()
            named = [(q, self._name(of_image[q], prompt)) for q in likely]
            found.append([(*hit, places[q]) for q, hit in named if hit is not None])
        return found

    def _name(self, probabilities: torch.Tensor, prompt: _Prompt) -> tuple[str, float] | None:
        hit = whole_phrase(probabilities, prompt.spans, self.config.box_threshold, self.config.text_threshold)
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
        kept = nms(boxes, scores, self.config.nms_iou)
        return Boxes(tuple(names[i] for i in kept), scores[kept], boxes[kept])


def _prompts(checkpoint: str, tokenizer: Any, longest: int, names: tuple[str, ...]) -> list[_Prompt]:
    ids = {name: tokenizer(name, add_special_tokens=False).input_ids for name in names}
    full_stop = tokenizer.convert_tokens_to_ids(".")
    prompts = []
    for chunk in _chunks(checkpoint, ids, tokenizer.unk_token_id, longest):
        tokens = tokenizer(prompt_text(chunk), return_tensors="pt").input_ids
        prompts.append(_Prompt(chunk, tokens, phrase_spans(tokens[0].tolist(), full_stop)))
    return prompts


def _chunks(
    checkpoint: str, ids: Mapping[str, Sequence[int]], unknown_id: int | None, longest: int
) -> list[tuple[str, ...]]:
    """The names, with their ids, as they share prompts of at most ``longest`` ids."""
    if unknown := [name for name in ids if unknown_id in ids[name]]:
        raise ValueError(f"grounded_sam: the tokenizer of {checkpoint} does not know {', '.join(unknown)}")
    return chunk_vocabulary(tuple(ids), lambda name: len(ids[name]), longest)


def check_vocabulary(config: GroundedSamConfig) -> None:
    """Refuse a vocabulary that a server could not start with, without its model and without transformers, whose import
    takes seconds.

    A detector that is not in a folder of this machine, with a ``tokenizer.json``, is not asked what words it knows.

    Raises:
        ValueError: names that are bad by themselves, or unknown to the detector's tokenizer, or too long for it.
        RewardServerError: the detector's files cannot be read.
    """
    names = load_vocabulary(config.vocabulary)
    folder = Path(config.detector)
    if (folder / "tokenizer.json").is_file():
        try:
            tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
            longest = json.loads((folder / "config.json").read_text()).get("max_text_len", MAX_TEXT_LEN)
        except Exception as error:  # tokenizers raises nothing narrower
            raise RewardServerError(f"grounded_sam.detector: cannot load {config.detector!r}: {error}") from error
        ids = {name: tokenizer.encode(name, add_special_tokens=False).ids for name in names}
        unknown_id = tokenizer.token_to_id(tokenizer.model.unk_token)
        _chunks(config.detector, ids, unknown_id, longest)


class Segmenter:
    """SAM or SAM 2, prompted with boxes.

    Raises:
        ValueError: the checkpoint is of another type than :data:`SEGMENTERS`.
        RewardServerError: the checkpoint cannot be loaded.
    """

    def __init__(self, checkpoint: str, device: str = "cpu") -> None:
        from transformers import Sam2Model, Sam2Processor, SamModel, SamProcessor

        kind = _check_type(checkpoint, "segmenter", SEGMENTERS)
        model, processor = (SamModel, SamProcessor) if kind == "sam" else (Sam2Model, Sam2Processor)
        self._device = device
        self._processor = _load(processor, checkpoint, "segmenter")
        self._model = _load(model, checkpoint, "segmenter", dtype=torch.float32).to(device).eval()

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
        # SAM pads images to a square and says how large they are inside it; SAM 2 stretches them.
        sizes = [inputs[key] for key in ("original_sizes", "reshaped_input_sizes") if key in inputs]
        found = self._processor.post_process_masks(outputs.pred_masks.cpu(), *sizes)
        return [mask[: len(b), 0] for mask, b in zip(found, boxes, strict=True)]


class GroundedSam:
    """Objects of photographs, with their mask areas. Usable in any process, without Ray.

    Raises:
        ValueError, RewardServerError: as :class:`Detector` and :class:`Segmenter`.
    """

    def __init__(self, config: GroundedSamConfig) -> None:
        torch.set_num_threads(config.threads)
        self._started = config
        self._detector = Detector(config)
        self._segmenter = Segmenter(config.segmenter, config.device)

    @property
    def config(self) -> GroundedSamConfig:
        """Settings as they are now."""
        return self._detector.config

    def reconfigure(self, settings: Mapping[str, Any]) -> None:
        """Change :data:`LIVE` settings, without loading a model.

        A setting that is not named gets the value the server was started with, so that a replica that starts later
        with the same settings serves alike. A call of :meth:`detect` under way keeps the settings it began with.

        Args:
            settings: fields of :class:`GroundedSamConfig`; ``main`` is a mapping of the fields that change.

        Raises:
            ValueError: a setting that is not live or has a bad value; then nothing changes.
        """
        self._detector = self._detector.with_config(with_settings(self._started, settings, LIVE, "grounded_sam"))

    def check_names(self, names: Sequence[str]) -> None:
        """Raises ValueError unless :meth:`detect` can look for these names."""
        self._detector.prompts(clean_names(names, "names"))

    def detect(
        self, images: Sequence[np.ndarray], masks: bool = False, names: Sequence[Sequence[str] | None] | None = None
    ) -> list[Detection]:
        """Objects of each image uint8 [H, W, 3] RGB; the models' processors resize them.

        Images of one size with the same names make one batch; padding to a common size would change their scores.

        Args:
            images: any sizes.
            masks: fill :attr:`DetectedObject.mask`.
            names: for each image what to look for in it, None: the vocabulary; as a whole None: the vocabulary in all.

        Raises:
            ValueError: an image is not uint8 RGB, or names that cannot be looked for.
        """
        if names is None:
            names = [None] * len(images)
        if len(names) != len(images):
            raise ValueError(f"names must have one entry per image, got {len(names)} for {len(images)}")
        return self.detect_all([(image, masks, of_image) for image, of_image in zip(images, names, strict=True)])

    def detect_all(self, requests: Sequence[Request]) -> list[Detection]:
        """Answers of requests that came together: image, whether masks are wanted, and names, as in :meth:`detect`."""
        detector = self._detector
        batches: dict[tuple[tuple[int, ...], tuple[str, ...] | None], list[int]] = {}
        for place, (image, _, names) in enumerate(requests):
            check_image(image)
            wanted = None if names is None else clean_names(names, "names")
            batches.setdefault((image.shape, wanted), []).append(place)
        answers: dict[int, Detection] = {}
        for (_, wanted), places in batches.items():
            images, keep_masks = [requests[i][0] for i in places], [requests[i][1] for i in places]
            answers |= zip(places, self._detect(detector, images, wanted, keep_masks), strict=True)
        return [answers[place] for place in range(len(requests))]

    def _detect(
        self, detector: Detector, images: list[np.ndarray], names: tuple[str, ...] | None, keep_masks: list[bool]
    ) -> list[Detection]:
        found = detector.detect(images, names)
        some = [i for i, boxes in enumerate(found) if boxes.names]
        masks = self._segmenter.masks([images[i] for i in some], [found[i].boxes for i in some]) if some else []
        of_image = dict(zip(some, masks, strict=True))
        answers = []
        for i, boxes in enumerate(found):
            objects = _objects(boxes, of_image[i], keep_masks[i]) if i in of_image else ()
            answers.append(Detection(objects, main_objects(objects, detector.config.main)))
        return answers


def _objects(found: Boxes, masks: torch.Tensor, keep_masks: bool) -> tuple[DetectedObject, ...]:
    """Boxes and their masks bool [N, H, W] as answered."""
    areas = masks.float().mean((1, 2)).tolist()
    rows = zip(found.names, found.scores.tolist(), found.boxes.tolist(), areas, masks, strict=True)
    return tuple(
        DetectedObject(name, score, (box[0], box[1], box[2], box[3]), area, mask.numpy() if keep_masks else None)
        for name, score, box, area, mask in rows
    )


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


def _check_type(checkpoint: str, role: str, known: Sequence[str]) -> str:
    """The checkpoint's ``model_type``. Raises ValueError if it is none of ``known``."""
    from transformers import PretrainedConfig

    try:
        settings, _ = PretrainedConfig.get_config_dict(checkpoint)
    except (OSError, ValueError) as error:
        raise RewardServerError(f"grounded_sam.{role}: cannot load {checkpoint!r}: {error}") from error
    kind = settings.get("model_type")
    if kind not in known:
        raise ValueError(f"grounded_sam.{role}: {checkpoint!r} is of type {kind!r}, not one of {', '.join(known)}")
    return kind
