"""A model family on disk: one directory with ``config.json``, ``model.safetensors`` and ``tokenizer.json``.

``config.json`` carries the sequence layout under ``layout`` (fields of :class:`vlcot.sequence.Layout`), so
the directory alone says how prompts and chains are written.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlcot.grammar import Grammar
from vlcot.sequence import Layout, SequenceBuilder
from vlcot.tokenizer.text import TextTokenizer
from vlcot.vocabulary import Vocabulary


@dataclass(frozen=True, eq=False)
class Family:
    """Vocabulary, layout and text tokenizer of one policy checkpoint."""

    vocabulary: Vocabulary
    layout: Layout
    text: TextTokenizer

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> Family:
        """Read a policy directory.

        Raises:
            FileNotFoundError: the directory, ``config.json`` or ``tokenizer.json`` is missing.
            ValueError: no layout, an impossible layout, or a tokenizer of another family.
        """
        config = read_config(directory)
        if not isinstance(config.get("layout"), dict):
            raise ValueError(f"{directory}/config.json has no 'layout': it is not a VLCoT policy")
        text = TextTokenizer.from_file(Path(directory) / "tokenizer.json")
        return cls(text.vocabulary(int(config["vocab_size"])), Layout(**config["layout"]), text)

    @property
    def grammar(self) -> Grammar:
        """Grammar of the answer."""
        return self.layout.grammar(self.vocabulary)

    @property
    def builder(self) -> SequenceBuilder:
        """Builds and parses sequences of this family."""
        return SequenceBuilder(self.vocabulary, self.layout, self.text.encode, self.text.decode)


def read_config(directory: str | Path) -> dict[str, Any]:
    """The ``config.json`` of a checkpoint directory.

    Raises:
        FileNotFoundError: the directory or the file is missing.
        ValueError: the file is no JSON object.
    """
    path = Path(directory) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {directory}: {path} does not exist")
    try:
        config = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} must hold a JSON object")
    return config
