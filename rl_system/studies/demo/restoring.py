"""One photograph through the policy, each step told as it happens.

The sampler is the one on transformers: a demo watches one chain id by id, which needs no engine of its own, and the
result is that of ``rl-system restore --backend transformers`` with the same seed.
"""

from __future__ import annotations

import base64
import io
import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from actors.reference_sampler import ReferenceSampler
from rl_system.runs.pictures import write_png
from rl_system.studies.restore.images import ImageRefused, Photograph, enlarged, to_bits, write_photograph
from rl_system.studies.restore.pictures import Drawing, OpenPicture
from rl_system.studies.restore.policy import Checkpoint, QuestionWriter, positions
from rl_system.studies.restore.run import ATTEMPTS
from vlcot.groups import Sample
from vlcot.partial import PartialChain
from vlcot.policy.model import VlcotForCausalLM
from vlcot.tokenizer.image import ImageTokenizer

Event = dict[str, Any]
Tell = Callable[[Event], None]
"""Takes an event; may raise, which ends the restoration."""
TELL_EVERY_S = 0.1


class Restorer:
    """A policy in memory that restores one photograph at a time.

    Args:
        checkpoint: policy and what goes with it.
        upscale: result over input, along a side.
        device: ``cpu`` or ``cuda``; float32 on the former, bfloat16 on the latter.
        most_tiles: that are drawn of a photograph; a larger one is shrunk first.

    Raises:
        ValueError: a checkpoint is missing or is no policy.
    """

    def __init__(self, checkpoint: Checkpoint, upscale: float, device: str, most_tiles: int) -> None:
        self._checkpoint = checkpoint
        self._most_tiles = most_tiles
        self._writer = QuestionWriter(checkpoint, device)
        self._decoder = ImageTokenizer.from_pretrained(checkpoint.image_tokenizer, device)
        dtype = torch.float32 if device == "cpu" else torch.bfloat16
        self._model = VlcotForCausalLM.from_pretrained(checkpoint.policy, dtype=dtype).to(device)
        side = self._writer.side
        self._drawing = Drawing(side, upscale, tile=side, overlap=side // 4)

    def restore(self, photograph: Photograph, seed: int, folder: Path, tell: Tell) -> None:
        """Restore ``photograph``; write ``before.png`` (bicubic) and ``restored.png`` to ``folder``.

        Events: ``begun`` (sizes, tiles, tags of the chain), then for each tile ``tile``, ``chain`` (texts so far, codes
        drawn of the open image) many times, ``image`` for each one that is complete, ``again`` where a chain was not
        well-formed; at last ``done``.

        Raises:
            ImageRefused: the photograph is too long and narrow, or the policy writes no complete chain.
            OSError: a file cannot be written.
        """
        started, tokens = time.monotonic(), 0
        given = photograph.size
        photograph = shrunk(photograph, self._drawing, self._most_tiles)
        picture = OpenPicture.of(photograph, self._drawing)
        tell(self._begun(given, picture))
        sampler = ReferenceSampler(
            self._model,
            self._writer.family,
            self._decoder,
            group_size=1,
            temperature=self._checkpoint.temperature,
            max_new_tokens=positions(self._checkpoint.policy) - self._writer.length,
            seed=seed,
        )
        for index in range(len(picture.plan)):
            sample, written = self._tile(sampler, picture, index, tell)
            tokens += written
            picture.draw(index, [sample])
        write_png(folder / "before.png", picture.bicubic())
        write_photograph(folder / "restored.png", picture.results()[0])
        tell({"type": "done", "seconds": round(time.monotonic() - started, 1), "tokens": tokens})

    def _begun(self, given: tuple[int, int], picture: OpenPicture) -> Event:
        height, width = picture.photograph.size
        partial = PartialChain(self._writer.family)
        return {
            "type": "begun",
            "given": [given[1], given[0]],
            "used": [width, height],
            "result": list(self._drawing.target(height, width)[::-1]),
            "tiles": len(picture.plan),
            "texts": partial.text_tags,
            "images": partial.image_tags,
            "notes": picture.photograph.notes,
        }

    def _tile(self, sampler: ReferenceSampler, picture: OpenPicture, index: int, tell: Tell) -> tuple[Sample, int]:
        """A well-formed chain for one tile, and the ids that were written until there was one."""
        top, left = picture.plan.corners[index]
        tokens = 0
        for attempt in range(ATTEMPTS):
            box = [left / picture.plan.width, top / picture.plan.height]
            box += [picture.plan.side / picture.plan.width, picture.plan.side / picture.plan.height]
            tell({"type": "tile", "tile": index + 1, "box": box})
            prompt = self._writer.prompt(f"{index}/{attempt}", index + (attempt << 32), picture.view(index))
            watcher = _Watcher(PartialChain(self._writer.family), self._decoder, tell)
            sample = sampler.generate(prompt, watch=watcher).samples[0]
            watcher.tell_chain()
            tokens += len(sample.ids)
            if sample.chain.well_formed:
                return sample, tokens
            tell({"type": "again", "reason": sample.chain.errors[0]})
        raise ImageRefused(f"the policy wrote no complete chain in {ATTEMPTS} attempts ({sample.chain.errors[0]})")


def shrunk(photograph: Photograph, drawing: Drawing, most_tiles: int) -> Photograph:
    """The photograph, smaller if it has more tiles than are drawn.

    Raises:
        ImageRefused: it is so long and narrow that nothing is left of its short side.
    """
    height, width = given = photograph.size
    factor = 1.0
    while len(drawing.plan(height, width)) > most_tiles:
        if min(height, width) == 1:
            raise ImageRefused(f"is too long and narrow to be drawn in {most_tiles} tiles")
        factor *= 0.98
        height, width = (max(1, math.floor(length * factor)) for length in given)
    if (height, width) == given:
        return photograph
    bits, alpha = photograph.bits, photograph.alpha
    return replace(
        photograph,
        colour=to_bits(enlarged(photograph.colour, height, width), bits),
        alpha=None if alpha is None else to_bits(enlarged(alpha, height, width), bits),
    )


class _Watcher:
    """Reads along while a chain is sampled, and tells of it."""

    def __init__(self, partial: PartialChain, decoder: ImageTokenizer, tell: Tell) -> None:
        self._partial, self._decoder, self._tell = partial, decoder, tell
        self._told = 0.0

    def __call__(self, sample: int, token: int) -> None:
        if self._partial.take(token):
            self.tell_chain()
            codes = self._partial.images[-1]
            pixels = self._decoder.decode(codes[None])[0].cpu().numpy()
            tag = self._partial.image_tags[len(self._partial.images) - 1]
            self._tell({"type": "image", "image": tag, "size": pixels.shape[1], "png": _uri(pixels)})
        elif time.monotonic() - self._told > TELL_EVERY_S:
            self.tell_chain()

    def tell_chain(self) -> None:
        """The texts so far, and how much of the open image is drawn."""
        self._told = time.monotonic()
        self._tell({"type": "chain", "texts": self._partial.texts, "drawing": self._partial.drawing})


def _uri(pixels: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
