"""One picture on its way: cut into views for the policy, put together from what the policy drew."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from rl_system.runs.pictures import STAGES
from rl_system.studies.restore.images import Photograph, enlarged, like, to_bits
from rl_system.studies.restore.tiles import Feathering, TilePlan
from vlcot.colour import ALIGNMENTS
from vlcot.groups import Sample


@dataclass(frozen=True)
class Drawing:
    """How pictures are cut and put together.

    Attributes:
        side: of what the policy sees and draws, in pixels.
        upscale: result over input, along a side.
        tile: side of a tile in pixels of the enlarged picture; shown to the policy at ``side``.
        overlap: pixels that neighbouring tiles share at least.
        align: a name in :data:`vlcot.colour.ALIGNMENTS`, or ``none``.
        samples: results of each picture.
        steps: of ``coarse`` and ``middle``, those of which the images are kept too; the policy must draw them.
    """

    side: int
    upscale: float
    tile: int
    overlap: int
    align: str = "wavelet"
    samples: int = 1
    steps: tuple[str, ...] = ()

    def target(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the result."""
        return math.floor(height * self.upscale + 0.5), math.floor(width * self.upscale + 0.5)

    def canvas(self, height: int, width: int) -> tuple[int, int]:
        """Size that is tiled: of the result, or larger in proportion, so that the shorter side holds a tile."""
        tall, wide = self.target(height, width)
        factor = max(1.0, self.tile / min(tall, wide))
        return tuple(max(self.tile, math.ceil(length * factor - 1e-9)) for length in (tall, wide))  # type: ignore[return-value]

    def plan(self, height: int, width: int) -> TilePlan:
        """Tiles of an input of this size."""
        return TilePlan.of(*self.canvas(height, width), self.tile, self.overlap)


@dataclass
class OpenPicture:
    """A picture of which tiles are being drawn.

    Attributes:
        photograph: the input.
        reference: float32 [H, W, 3] in [0, 1], the input enlarged to the canvas (bicubic).
        chains: of each tile, its chains in order of the samples; for the record.
    """

    drawing: Drawing
    photograph: Photograph
    plan: TilePlan
    reference: np.ndarray
    chains: dict[int, tuple[Sample, ...]] = field(default_factory=dict)
    _canvases: list[dict[str, Feathering]] = field(default_factory=list)

    @classmethod
    def of(cls, photograph: Photograph, drawing: Drawing) -> OpenPicture:
        """Cut ``photograph`` for the first time. Raises MemoryError: the result does not fit."""
        plan = drawing.plan(*photograph.size)
        reference = enlarged(photograph.colour, plan.height, plan.width)
        canvases = [{stage: Feathering(plan) for stage in (*drawing.steps, "final")} for _ in range(drawing.samples)]
        return cls(drawing, photograph, plan, reference, {}, canvases)

    def view(self, index: int) -> np.ndarray:
        """What the policy is shown of tile ``index``, uint8 [side, side, 3]."""
        return to_bits(self._resized(self.plan.cut(self.reference, index), self.drawing.side), 8)

    def draw(self, index: int, samples: Sequence[Sample]) -> None:
        """Put in place what the policy drew of tile ``index``; every chain has its images."""
        self.chains[index] = tuple(samples)
        reference = self.plan.cut(self.reference, index)
        for canvases, sample in zip(self._canvases, samples, strict=True):
            for stage, image in zip(STAGES[-len(sample.images) :], sample.images, strict=True):
                if stage in canvases and image is not None:
                    canvases[stage].add(index, self._fitted(stage, image, reference))

    @property
    def complete(self) -> bool:
        """Whether every tile is drawn."""
        return len(self.chains) == len(self.plan)

    def results(self) -> list[Photograph]:
        """The result of each sample, exactly ``upscale`` times the input."""
        target = self.drawing.target(*self.photograph.size)
        return [like(self.photograph, _shrunk(canvas["final"].picture(), *target)) for canvas in self._canvases]

    def step(self, sample: int, stage: str) -> np.ndarray:
        """uint8 [h, w, 3]: the coarse (1/4) or middle (1/2) image of the whole canvas."""
        share = {"coarse": 4, "middle": 2}[stage]
        size = [max(1, length // share) for length in (self.plan.height, self.plan.width)]
        return to_bits(_shrunk(self._canvases[sample][stage].picture(), *size), 8)

    def bicubic(self) -> np.ndarray:
        """uint8 [h, w, 3]: the input enlarged to the size of the result."""
        return to_bits(enlarged(self.photograph.colour, *self.drawing.target(*self.photograph.size)), 8)

    def _fitted(self, stage: str, image: np.ndarray, reference: np.ndarray) -> np.ndarray:
        """float32 [tile, tile, 3], in the colours of ``reference`` if it is the final image."""
        values = image.astype(np.float32) / np.float32(255)
        if stage != "final":
            share = self.drawing.side // len(values)
            return self._resized(values.repeat(share, axis=0).repeat(share, axis=1), self.drawing.tile)
        values = self._resized(values, self.drawing.tile)
        align = ALIGNMENTS.get(self.drawing.align)
        return values if align is None else align(values, reference).astype(np.float32)

    @staticmethod
    def _resized(values: np.ndarray, side: int) -> np.ndarray:
        return values if len(values) == side else enlarged(values, side, side)


def _shrunk(values: np.ndarray, height: int, width: int) -> np.ndarray:
    """Pillow's bicubic with antialiasing, or exact means where that is a whole factor."""
    tall, wide = values.shape[:2]
    if (tall, wide) == (height, width):
        return values
    if tall % height == 0 and wide % width == 0:
        return values.reshape(height, tall // height, width, wide // width, 3).mean(axis=(1, 3))
    return enlarged(values, height, width)
