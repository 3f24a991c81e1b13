"""A group with its rewards as one file: a SHA-256, and a NumPy archive without pickles of which it is."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping
from dataclasses import astuple
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.npyio import NpzFile

from rl_system.runs.groups import score_record
from vlcot.groups import Absent, Failed, Group, Prompt, Sample, Score, Scored, ScoredGroup, VersionSpan
from vlcot.sequence import ParsedChain

FORMAT = 1
"""Of the record; a file of another one is not read."""
_DIGEST = 32
"""Bytes of SHA-256. The archive has checksums of its own, but not over its names and flags."""


class UnreadableGroupError(ValueError):
    """The file is damaged, or of another format."""


def group_bytes(scored: ScoredGroup) -> bytes:
    """The file's content. Of the prompt it has only a digest: whoever reads the group has the prompt again.

    Raises:
        TypeError, ValueError: the detail of a reward is not JSON.
    """
    samples = scored.group.samples
    arrays = {
        "ids": np.concatenate([sample.ids for sample in samples]),
        "logprobs": np.concatenate([sample.logprobs for sample in samples]),
        "supports": np.concatenate([sample.supports for sample in samples]),
        "totals": scored.totals,
        "valid": scored.valid,
    }
    for i, sample in enumerate(samples):
        for kind, images in (("image", sample.images), ("codes", sample.chain.images)):
            arrays |= {f"{kind}-{i}-{place}": image for place, image in enumerate(images) if image is not None}
    record = json.dumps(_record(scored), allow_nan=False).encode()
    file = io.BytesIO()
    np.savez(file, allow_pickle=False, record=np.frombuffer(record, np.uint8), **arrays)
    archive = file.getvalue()
    return hashlib.sha256(archive).digest() + archive


class GroupFile:
    """A file of :func:`group_bytes`.

    Raises:
        UnreadableGroupError: it is none, or damaged.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with self._archive() as archive:
            record = json.loads(archive["record"].tobytes())
        if record["format"] != FORMAT:
            raise UnreadableGroupError(f"{path} has format {record['format']}, this version reads {FORMAT}")
        self._record = record
        versions = [version for sample in record["samples"] for version, _, _ in sample["versions"]]
        self.oldest, self.newest = min(versions), max(versions)
        """Weight versions that sampled a token."""

    def is_of(self, prompt: Prompt) -> bool:
        """Whether ``prompt`` is what the group was made of, to the last pixel."""
        return bool(self._record["prompt"] == _digest(prompt))

    def read(self, prompt: Prompt) -> ScoredGroup:
        """The group, of ``prompt``.

        Raises:
            UnreadableGroupError: the file is damaged.
        """
        record = self._record
        with self._archive() as archive:
            arrays = dict(archive)
        ends = np.cumsum([sample["tokens"] for sample in record["samples"]])[:-1]
        ids, logprobs, supports = (np.split(arrays[name], ends) for name in ("ids", "logprobs", "supports"))
        samples = tuple(
            Sample(
                ids=ids[i],
                logprobs=logprobs[i],
                supports=supports[i],
                versions=tuple(VersionSpan(*span) for span in sample["versions"]),
                finish_reason=sample["finish_reason"],
                chain=_chain(arrays, i, sample),
                images=tuple(arrays.get(f"image-{i}-{place}") for place in range(sample["images"])),
            )
            for i, sample in enumerate(record["samples"])
        )
        return ScoredGroup(
            group=Group(prompt, samples, record["generation_s"], record["actor"]),
            scores=tuple({n: _score(s) for n, s in sample["scores"].items()} for sample in record["samples"]),
            totals=arrays["totals"],
            valid=arrays["valid"],
            objects=tuple(record["objects"]),
            reward_s=record["reward_s"],
        )

    def _archive(self) -> NpzFile:
        try:
            data = self._path.read_bytes()
        except OSError as error:
            raise UnreadableGroupError(f"{self._path}: {error}") from error
        if hashlib.sha256(data[_DIGEST:]).digest() != data[:_DIGEST]:
            raise UnreadableGroupError(f"{self._path} is damaged: it does not have the checksum that it begins with")
        archive = np.load(io.BytesIO(data[_DIGEST:]), allow_pickle=False)
        assert isinstance(archive, NpzFile)  # group_bytes wrote it
        return archive


def _record(scored: ScoredGroup) -> dict[str, Any]:
    group = scored.group
    return {
        "format": FORMAT,
        "row_id": group.prompt.row_id,
        "prompt": _digest(group.prompt),
        "actor": group.actor,
        "generation_s": group.generation_s,
        "objects": list(scored.objects),
        "reward_s": dict(scored.reward_s),
        "samples": [
            {
                "tokens": len(sample.ids),
                "versions": [astuple(span) for span in sample.versions],
                "finish_reason": sample.finish_reason,
                "texts": list(sample.chain.texts),
                "errors": list(sample.chain.errors),
                "images": len(sample.images),
                "scores": {name: score_record(score) for name, score in scores.items()},
            }
            for sample, scores in zip(group.samples, scored.scores, strict=True)
        ],
    }


def _chain(arrays: Mapping[str, np.ndarray], i: int, sample: Mapping[str, Any]) -> ParsedChain:
    degradation, coarse, middle, fine = sample["texts"]
    codes = tuple(arrays.get(f"codes-{i}-{place}") for place in range(sample["images"]))
    return ParsedChain(degradation, coarse, middle, fine, codes, tuple(sample["errors"]))


def _score(record: Mapping[str, Any]) -> Score:
    if record["kind"] == "scored":
        return Scored(record["value"], record["detail"])
    return (Absent if record["kind"] == "absent" else Failed)(record["reason"])


def _digest(prompt: Prompt) -> str:
    """SHA-256 over everything that the group rests on."""
    arrays = [array for array in (prompt.ids, prompt.lr_image, prompt.truth) if array is not None]
    words = (prompt.group_id, prompt.row_id, int(prompt.seed), prompt.degradation, prompt.objects)
    digest = hashlib.sha256(repr((words, [(a.shape, a.dtype.str) for a in arrays])).encode())
    for array in arrays:
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()
