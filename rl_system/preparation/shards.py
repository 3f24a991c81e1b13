"""One shard: from photographs to a Parquet file. Everything that is drawn hangs on the seed, the path and the draw."""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from rl_system.data.prepared import SCHEMA, SHARDS, sha256_of
from rl_system.preparation import texts
from rl_system.preparation.plan import Shard, Skipped
from rl_system.preparation.settings import PrepareConfig, degradation, family
from vlcot.degradation import degrade, describe, make_target
from vlcot.examples import chain_examples
from vlcot.images import area_downscale
from vlcot.tokenizer.image import ImageTokenizer

_ROW_GROUP = 64
_AT_ONCE = 8
"""Samples of a shard whose captions are asked for at the same time."""
_SKIPPED = b"skipped"


@dataclass(frozen=True, eq=False)
class Cut:
    """A target with where it was cut from: uint8 [s, s, 3] RGB."""

    target: np.ndarray
    top: int
    left: int
    flip: bool


class ShardWriter:
    """Makes shards; one per process.

    Args:
        config: checked settings.
    """

    def __init__(self, config: PrepareConfig) -> None:
        torch.set_num_threads(1)  # a process has one core, and sums in another order give other bits
        self._config = config
        self._degradation = degradation(config)
        self._builder = family(config).builder
        self._images = ImageTokenizer.from_pretrained(config.image_tokenizer)
        self._size = self._builder.layout.full_size

    def write(self, shard: Shard, files: texts.Files) -> None:
        """Make the file of ``shard`` in one move; ``files`` holds the texts of its photographs.

        Raises:
            texts.ServerFailed: a server gave no answer; no file is made.
        """
        skipped: list[Skipped] = []
        cuts: list[tuple[dict[str, Any], Cut, int]] = []
        for place, photo in enumerate(shard.photographs):
            path = Path(self._config.input) / photo.path
            try:
                with Image.open(path) as image:
                    pixels = np.asarray(image.convert("RGB"))
            except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
                skipped.append(Skipped(photo.path, f"cannot be read: {str(error).splitlines()[0]}"))
                continue
            digest = sha256_of(path)
            for draw in range(self._config.samples_per_image):
                row_id = (shard.first + place) * self._config.samples_per_image + draw
                rng = _generator(self._config.seed, photo.path, draw)
                cut = self._cut(pixels, rng)
                facts = {"row_id": row_id, "image": photo.path, "image_sha256": digest, "draw": draw}
                cuts.append((facts, cut, int(rng.integers(2**53))))
        said = self._texts([(facts["image"], cut.target) for facts, cut, _ in cuts], files)
        rows = [self._row(*cut, *of) for cut, of in zip(cuts, said, strict=True)]
        listed = json.dumps([asdict(s) for s in skipped])
        table = pa.Table.from_pylist(rows, schema=SCHEMA).replace_schema_metadata({_SKIPPED: listed})
        _write(Path(self._config.output) / SHARDS / shard.name, table)

    def _cut(self, pixels: np.ndarray, rng: np.random.Generator) -> Cut:
        """Flip, pad by reflection where the photograph is smaller than the crop, crop, average down, sharpen."""
        side = self._config.crop or self._size
        flip = bool(rng.random() < 0.5)
        if flip:
            pixels = pixels[:, ::-1]
        missing = [max(0, side - n) for n in pixels.shape[:2]]
        if any(missing):
            pixels = np.pad(pixels, [(0, missing[0]), (0, missing[1]), (0, 0)], mode="reflect")
        top, left = (int(rng.integers(0, n - side + 1)) for n in pixels.shape[:2])
        cropped = np.ascontiguousarray(pixels[top : top + side, left : left + side])
        target = make_target(area_downscale(cropped, self._size), self._degradation)
        return Cut(target, top, left, flip)

    def _texts(
        self, samples: Sequence[tuple[str, np.ndarray]], files: texts.Files
    ) -> list[tuple[texts.Texts, tuple[str, ...] | None]]:
        """Captions and objects of each sample."""
        asked = asyncio.run(self._ask([t for _, t in samples])) if self._config.url else [(None, None)] * len(samples)
        answers = []
        for (image, _), (captions, names) in zip(samples, asked, strict=True):
            captions = files.captions[image] if files.captions is not None else captions
            names = files.objects[image] if files.objects is not None else names
            if captions is None:
                raise RuntimeError(f"nobody was asked for the captions of {image}")
            answers.append((captions, names))
        return answers

    async def _ask(self, targets: Sequence[np.ndarray]) -> list[Any]:
        client, places = texts.client(self._config), asyncio.Semaphore(_AT_ONCE)

        async def one(target: np.ndarray) -> Any:
            async with places:
                return await texts.ask(client, self._config, target)

        try:
            return await asyncio.gather(*map(one, targets))
        finally:
            await client.close()

    def _row(
        self, facts: dict[str, Any], cut: Cut, seed: int, captions: texts.Texts, names: tuple[str, ...] | None
    ) -> dict[str, Any]:
        lr, record = degrade(cut.target, self._degradation, seed)
        words = describe(record, self._degradation)
        # One at a time: in a batch the same image may round to other codes.
        [example] = chain_examples(
            self._config.instruction, [lr], [cut.target], [(words, *captions)], self._builder, self._images
        )
        coarse, middle, fine = captions
        *smaller, final_codes = (codes.reshape(-1) for codes in example.codes)
        coarse_codes, middle_codes = ([], [], *smaller)[-2:]
        return facts | {
            "prompt_ids": example.prompt,
            "answer_ids": example.answer,
            "prompt_tokens": len(example.prompt),
            "answer_tokens": len(example.answer),
            "top": cut.top,
            "left": cut.left,
            "flip": cut.flip,
            "target": _png(cut.target),
            "lr": _png(lr),
            "degradation": words,
            "record": json.dumps(record.to_dict()),
            "coarse": coarse,
            "middle": middle,
            "fine": fine,
            "objects": None if names is None else list(names),
            "lr_codes": example.lr_codes.reshape(-1),
            "coarse_codes": coarse_codes,
            "middle_codes": middle_codes,
            "final_codes": final_codes,
        }


def skipped_in(file: Path) -> list[Skipped]:
    """The photographs that were planned for a shard and could not be read."""
    metadata = pq.read_schema(file).metadata or {}
    return [Skipped(**entry) for entry in json.loads(metadata[_SKIPPED])]


def _generator(seed: int, path: str, draw: int) -> np.random.Generator:
    """The same whatever else is prepared, in whatever order."""
    digest = hashlib.blake2b(path.encode(), digest_size=8).digest()
    return np.random.default_rng([seed, draw, int.from_bytes(digest, "big")])


def _png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", compress_level=3)
    return buffer.getvalue()


def _write(path: Path, table: pa.Table) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        pq.write_table(table, temporary, row_group_size=_ROW_GROUP, compression="zstd")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
