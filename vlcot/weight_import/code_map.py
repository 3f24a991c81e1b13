"""The image codes' token ids, read from a tokenizer and proved a bijection."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from vlcot.vocabulary import Vocabulary, code_name
from vlcot.weight_import.source import ImportRefused

CODEBOOK = 16_384
"""LlamaGen's codebook (the paper's 16,536 is a slip: domain.md §2.3)."""


def read_vocabulary(tokenizer: Path, rows: int, codebook: int = CODEBOOK) -> Vocabulary:
    """The family's ids; the image codes must map one to one onto ids.

    Args:
        tokenizer: a ``tokenizers`` JSON file (Lumina-mGPT, PURE: ``text_tokenizer.json``).
        rows: embedding rows of the source; the result has more when image ids lie above them.
        codebook: how many codes there must be.

    Raises:
        ImportRefused: no tokenizer, not the codes 0..codebook-1 once each, two names of one id, or an id without row.
    """
    if not tokenizer.is_file():
        raise ImportRefused(f"no tokenizer at {tokenizer}")
    try:
        table = Tokenizer.from_file(str(tokenizer)).get_vocab(with_added_tokens=True)
    except Exception as error:  # the Rust side raises bare Exception
        raise ImportRefused(f"{tokenizer} is not a tokenizers JSON file: {error}") from error
    found = {name for name in table if re.fullmatch(r"IMGIMG[A-J]+Z", name)}
    expected = {code_name(code) for code in range(codebook)}
    if found != expected:
        missing, extra = sorted(expected - found), sorted(found - expected)
        said = "; ".join(f"{len(n)} {k}, as {n[0]!r}" for k, n in (("missing", missing), ("too many", extra)) if n)
        raise ImportRefused(f"{tokenizer}: the image tokens must be the codes 0..{codebook - 1}; {said}")
    uses = Counter(table.values())
    for name in sorted(expected):
        if uses[table[name]] > 1:
            raise ImportRefused(f"{tokenizer}: id {table[name]} of '{name}' has another name too")
    try:
        vocabulary = Vocabulary.from_token_table(table, max(rows, 1 + max(table[name] for name in expected)))
    except ValueError as error:
        raise ImportRefused(f"{tokenizer}: {error}") from error
    if not np.array_equal(vocabulary.code_of_id[vocabulary.image_ids], np.arange(codebook)):
        raise ImportRefused(f"{tokenizer}: codes and ids do not map one to one")
    return vocabulary


def describe(vocabulary: Vocabulary) -> str:
    """The ids of the codes in a sentence: ranges, and whether they rise with the codes."""
    ids = np.sort(vocabulary.image_ids)
    starts = np.flatnonzero(np.diff(ids, prepend=-2) != 1)
    ends = np.append(starts[1:], len(ids)) - 1
    ranges = ", ".join(f"{ids[a]}..{ids[b]}" for a, b in zip(starts, ends, strict=True))
    order = (
        "in the order of the codes" if (np.diff(vocabulary.image_ids) > 0).all() else "not in the order of the codes"
    )
    return f"Image codes: {len(ids):,}, one to one onto the token ids {ranges}, {order} (read from the tokenizer)."
