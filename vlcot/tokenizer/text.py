"""The text side of a family's tokenizer (a ``tokenizers`` JSON file)."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer

from vlcot.vocabulary import Vocabulary


class TextTokenizer:
    """BPE text <-> ids, and the family's :class:`Vocabulary`."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        tokenizer.encode_special_tokens = True  # a caption that spells "<eoss>" must not become image ids

    @classmethod
    def from_file(cls, path: str | Path) -> TextTokenizer:
        """Load ``tokenizer.json``.

        Raises:
            FileNotFoundError: no such file.
            ValueError: the file is no tokenizer.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"no tokenizer at {path}")
        try:
            return cls(Tokenizer.from_file(str(path)))
        except Exception as error:  # the Rust side raises bare Exception
            raise ValueError(f"{path} is not a tokenizers JSON file: {error}") from error

    def vocabulary(self, size: int | None = None) -> Vocabulary:
        """Ids of the family; ``size`` is the number of embedding rows."""
        return Vocabulary.from_token_table(self._tokenizer.get_vocab(with_added_tokens=True), size)

    def encode(self, text: str) -> list[int]:
        """Ids of ``text`` without special tokens."""
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: list[int]) -> str:
        """Text of ``ids``; bytes that are no UTF-8 become U+FFFD."""
        return str(self._tokenizer.decode(ids, skip_special_tokens=False))
