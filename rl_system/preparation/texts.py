"""Captions and main objects of a sample: from a file, or from the reward servers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from reward_servers.client import RewardClient
from reward_servers.http_guard import token_of_environment
from reward_servers.http_transport import HttpTransport
from rl_system.preparation.settings import SERVER_CAPTIONS, SERVER_OBJECTS, PrepareConfig
from vlcot.groups import Failed
from vlcot.sequence import CHAIN_TAGS

Texts = tuple[str, str, str]
ROUNDS = ("coarse", "middle", "fine")


class ServerFailed(RuntimeError):
    """A server gave no answer for a sample."""


@dataclass(frozen=True)
class Files:
    """What the files say: image path -> three texts, image path -> names; None for a source that is no file."""

    captions: dict[str, Texts] | None
    objects: dict[str, tuple[str, ...]] | None

    @classmethod
    def read(cls, config: PrepareConfig) -> Files:
        """Read and check both files. ValueError names the file, the line and what is wrong."""
        captions = objects = None
        if config.captions is not None and config.captions != SERVER_CAPTIONS:
            captions = {image: _texts(record, where) for image, record, where in _lines(Path(config.captions))}
        if config.objects is not None and config.objects != SERVER_OBJECTS:
            objects = {image: _names(record, where) for image, record, where in _lines(Path(config.objects))}
        return cls(captions, objects)

    def of(self, images: Sequence[str]) -> Files:
        """Only these images.

        Raises:
            ValueError: one of them is missing in a file.
        """
        for kind, table in (("captions", self.captions), ("objects", self.objects)):
            missing = [] if table is None else [image for image in images if image not in table]
            if missing:
                more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
                raise ValueError(f"the {kind} file has no line for {missing[0]}{more}")
        return Files(
            None if self.captions is None else {i: self.captions[i] for i in images},
            None if self.objects is None else {i: self.objects[i] for i in images},
        )


def _lines(path: Path) -> list[tuple[str, dict[str, Any], str]]:
    found = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        where = f"{path} line {number}"
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{where} is no JSON: {error}") from None
        if not isinstance(record, dict) or not isinstance(record.get("image"), str):
            raise ValueError(f'{where} must be an object with "image": a path below the input folder')
        if record["image"] in found:
            raise ValueError(f"{where}: {record['image']} has a line already")
        found[record["image"]] = (record["image"], record, where)
    return list(found.values())


def _texts(record: dict[str, Any], where: str) -> Texts:
    texts = [record.get(name) for name in ROUNDS]
    for name, text in zip(ROUNDS, texts, strict=True):
        if not isinstance(text, str) or not text.strip() or any(f"{tag}>" in text for tag in CHAIN_TAGS):
            raise ValueError(f'{where}: "{name}" must be a text that is not empty and has no tag of the chain')
    coarse, middle, fine = (" ".join(str(text).split()) for text in texts)
    return coarse, middle, fine


def _names(record: dict[str, Any], where: str) -> tuple[str, ...]:
    names = record.get("objects")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f'{where}: "objects" must be a list of names')
    cleaned = (" ".join(name.lower().split()) for name in names)
    return tuple(dict.fromkeys(name for name in cleaned if name))


async def ask(
    client: RewardClient, config: PrepareConfig, target: np.ndarray
) -> tuple[Texts | None, tuple[str, ...] | None]:
    """What the servers that ``config`` names say of a target uint8 [n, n, 3].

    Raises:
        ServerFailed: one gave no answer.
    """
    texts = names = None
    if config.captions == SERVER_CAPTIONS:
        captions = await client.caption(target)
        if isinstance(captions, Failed):
            raise ServerFailed(captions.reason)
        texts = captions.coarse, captions.middle, captions.fine
    if config.objects == SERVER_OBJECTS:
        detection = await client.objects(target)
        if isinstance(detection, Failed):
            raise ServerFailed(detection.reason)
        names = detection.main
    return texts, names


def client(config: PrepareConfig) -> RewardClient:
    """For one event loop. ValueError if there is no token."""
    return RewardClient(HttpTransport(str(config.url), token_of_environment()), config.server_timeout_s)
