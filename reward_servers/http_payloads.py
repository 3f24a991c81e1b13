"""Requests and answers of the reward servers as JSON, for HTTP. Floats survive exactly; NaN never appears."""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from reward_servers.contract import Captions, DetectedObject, Detection, Judgement, Measurement, Tags
from reward_servers.http_images import LIMITS, ImagePayload, decode_mask, encode_mask

Finite = Annotated[float, Field(allow_inf_nan=False)]
Images = Annotated[list[ImagePayload], Field(min_length=1, max_length=LIMITS.images)]
Name = Annotated[str, Field(min_length=1, max_length=64)]


LARGEST_INTEGER = 2**53 - 1
"""Up to here every JSON reader has integers exactly (RFC 8259, section 6)."""


class _Payload(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ObjectsRequest(_Payload):
    """Objects in ``image``: those of the server's vocabulary, or ``names``."""

    image: ImagePayload
    names: Annotated[list[Name], Field(min_length=1, max_length=LIMITS.names)] | None = None
    masks: Annotated[bool, Field(strict=True)] = False

    def arguments(self) -> dict[str, Any]:
        """As the replica's method takes them. Raises ValueError for a bad image, as all requests do."""
        return {"image": self.image.array(), "names": self.names, "masks": self.masks}


class JudgeRequest(_Payload):
    """Judge ``images``, restorations of ``lr``; ``seed`` draws the orders in which they are shown."""

    lr: ImagePayload
    images: Images
    seed: Annotated[int, Field(strict=True, ge=0, le=LARGEST_INTEGER)]

    def arguments(self) -> dict[str, Any]:
        """As the replica's method takes them."""
        lr, *images = _arrays([self.lr, *self.images])
        return {"lr": lr, "images": images, "seed": self.seed}


class ImageRequest(_Payload):
    """One image to caption or tag."""

    image: ImagePayload

    def arguments(self) -> dict[str, Any]:
        """As the replica's method takes them."""
        return {"image": self.image.array()}


class MeasureRequest(_Payload):
    """Measure ``images``, against ``reference`` where a metric compares."""

    images: Images
    reference: ImagePayload | None = None

    def arguments(self) -> dict[str, Any]:
        """As the replica's method takes them."""
        if self.reference is None:
            return {"images": _arrays(self.images), "reference": None}
        reference, *images = _arrays([self.reference, *self.images])
        return {"images": images, "reference": reference}


def _arrays(images: list[ImagePayload]) -> list[np.ndarray]:
    """The pixels, once all headers together are within the limit. Raises ValueError."""
    pixels = sum(image.pixels() for image in images)
    if pixels > LIMITS.request_pixels:
        raise ValueError(f"the request's images have {pixels} pixels; at most {LIMITS.request_pixels} in all")
    return [image.array() for image in images]


class ObjectAnswer(_Payload):
    """One detected object; ``mask`` is a 1-bit PNG in base64."""

    name: str
    score: Finite
    box: tuple[Finite, Finite, Finite, Finite]
    mask_area: Finite
    mask: str | None = None


class DetectionAnswer(_Payload):
    """:class:`Detection`."""

    objects: list[ObjectAnswer]
    main: list[str]

    @classmethod
    def of(cls, answer: Detection) -> DetectionAnswer:
        """From the replica's answer."""
        objects = [
            ObjectAnswer(
                name=o.name,
                score=o.score,
                box=o.box,
                mask_area=o.mask_area,
                mask=None if o.mask is None else encode_mask(o.mask),
            )
            for o in answer.objects
        ]
        return cls(objects=objects, main=list(answer.main))

    def answer(self) -> Detection:
        """Back again. Raises ValueError for a mask that is none."""
        objects = (
            DetectedObject(o.name, o.score, o.box, o.mask_area, None if o.mask is None else decode_mask(o.mask))
            for o in self.objects
        )
        return Detection(tuple(objects), tuple(self.main))


class JudgementAnswer(_Payload):
    """:class:`Judgement`."""

    quality: Finite
    realism: Finite
    consistency: Finite
    rationale: str = ""


class JudgementsAnswer(_Payload):
    """One judgement per image, in their order."""

    judgements: list[JudgementAnswer]

    @classmethod
    def of(cls, answer: list[Judgement]) -> JudgementsAnswer:
        """From the replica's answer."""
        return cls(judgements=[JudgementAnswer(**vars(judgement)) for judgement in answer])

    def answer(self) -> list[Judgement]:
        """Back again."""
        return [Judgement(**judgement.model_dump()) for judgement in self.judgements]


class CaptionsAnswer(_Payload):
    """:class:`Captions`."""

    coarse: str
    middle: str
    fine: str

    @classmethod
    def of(cls, answer: Captions) -> CaptionsAnswer:
        """From the replica's answer."""
        return cls(**vars(answer))

    def answer(self) -> Captions:
        """Back again."""
        return Captions(**self.model_dump())


class TagsAnswer(_Payload):
    """:class:`Tags`."""

    names: list[str]

    @classmethod
    def of(cls, answer: Tags) -> TagsAnswer:
        """From the replica's answer."""
        return cls(names=list(answer.names))

    def answer(self) -> Tags:
        """Back again."""
        return Tags(tuple(self.names))


class MeasurementAnswer(_Payload):
    """:class:`Measurement`."""

    values: dict[str, list[Finite]]

    @classmethod
    def of(cls, answer: Measurement) -> MeasurementAnswer:
        """From the replica's answer."""
        return cls(values={name: list(values) for name, values in answer.values.items()})

    def answer(self) -> Measurement:
        """Back again."""
        return Measurement({name: tuple(values) for name, values in self.values.items()})


class ReadyAnswer(_Payload):
    """What a replica says of itself: checkpoints, process id, versions, live settings."""

    about: dict[str, Any]

    @classmethod
    def of(cls, answer: dict[str, Any]) -> ReadyAnswer:
        """From the replica's answer."""
        return cls(about=answer)

    def answer(self) -> dict[str, Any]:
        """Back again."""
        return self.about


class ErrorDetail(_Payload):
    """``type``: bad_request, invalid, unauthorised, too_large, too_slow, no_json, no_answer, internal."""

    type: str
    message: str


class ErrorAnswer(_Payload):
    """Body of every answer that is none."""

    error: ErrorDetail


ANSWERS: dict[str, Any] = {
    "objects": DetectionAnswer,
    "judge": JudgementsAnswer,
    "caption": CaptionsAnswer,
    "tag": TagsAnswer,
    "measure": MeasurementAnswer,
    "ready": ReadyAnswer,
}
"""Method -> model of its answer."""


def encode(arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a method as the JSON that its request model reads. Raises ValueError for a bad image."""
    return {name: _encoded(value) for name, value in arguments.items() if value is not None}


def _encoded(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return ImagePayload.of(value).model_dump(exclude_none=True)
    return [_encoded(item) for item in value] if isinstance(value, list | tuple) else value
