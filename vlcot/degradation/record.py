"""Everything that was drawn for one LR image."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from vlcot.degradation.kernels import BlurKernel

UP, DOWN, KEEP = RESIZE_DIRECTIONS = ("up", "down", "keep")
GAUSSIAN, POISSON = "gaussian", "poisson"


@dataclass(frozen=True)
class Resize:
    """A drawn resize: ``direction`` of ``RESIZE_DIRECTIONS``, ``factor`` (1 for keep), interpolation ``mode``."""

    direction: str
    factor: float
    mode: str


@dataclass(frozen=True)
class Noise:
    """Drawn noise: ``level`` is sigma of 255 (gaussian) or the scale (poisson); ``seed`` draws the pixels."""

    kind: str
    level: float
    gray: bool
    seed: int


@dataclass(frozen=True)
class Stage:
    """One stage in the order it is applied; ``blur`` is None where it was skipped."""

    blur: BlurKernel | None
    resize: Resize
    noise: Noise
    jpeg_quality: int


@dataclass(frozen=True)
class DegradationRecord:
    """All parameters of one degradation: with the target it gives the LR image bit for bit.

    Attributes:
        height, width: size of the target, pixels.
        stage1, stage2: the two stages. The factor of stage 2's resize counts from the LR size.
        final_sinc: the last filter, None where it was skipped.
        final_mode: interpolation of the last resize, to the LR size.
        jpeg_last: JPEG of stage 2 after the last resize and filter, else before them.
    """

    height: int
    width: int
    stage1: Stage
    stage2: Stage
    final_sinc: BlurKernel | None
    final_mode: str
    jpeg_last: bool

    def to_dict(self) -> dict[str, Any]:
        """Nested dicts of str, int, float, bool and None; JSON keeps it exactly."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> DegradationRecord:
        """The record that ``to_dict`` gave.

        Raises:
            ValueError: a field is missing or unknown.
        """
        try:
            fields = dict(data)
            fields["stage1"] = _stage(fields["stage1"])
            fields["stage2"] = _stage(fields["stage2"])
            fields["final_sinc"] = _kernel(fields["final_sinc"])
            return cls(**fields)
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a degradation record: {error}") from error


def _stage(data: Mapping[str, Any]) -> Stage:
    fields = dict(data)
    fields["blur"] = _kernel(fields["blur"])
    fields["resize"] = Resize(**fields["resize"])
    fields["noise"] = Noise(**fields["noise"])
    return Stage(**fields)


def _kernel(data: Mapping[str, Any] | None) -> BlurKernel | None:
    return None if data is None else BlurKernel(**data)
