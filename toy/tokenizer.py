"""Builds the tokenizer of the toy policy: Chameleon's token names at small ids, text in whole words.

    python -m toy.tokenizer toy/weights/policy

Ids: ``<s> <pad> </s> <unk>``, 512 image codes (4..515), image end and start, turn end, new line, the grid sizes
1, 2 and 4, then text: 256 bytes, so that every text can be written, the tags of the chain, and the words of
the toy corpus that save most ids. Text has no merges: a piece is one word of the list or is spelled in bytes.
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from toy.rows import INSTRUCTION, row
from vlcot import vocabulary as names
from vlcot.sequence import CHAIN_TAGS, IMAGE_PLACEHOLDER

CODEBOOK = 512
GRID_UNITS = (1, 2, 4)
VOCABULARY_SIZE = 1024
CORPUS_ROWS = 3000

_PIECE = rf"</?(?:{'|'.join(CHAIN_TAGS)})>| ?[A-Z]?[a-z']+[,;\]]?|[\s\S]"
"""A tag; a word with the space before and the comma after it; else one character. No piece spells a special token."""


def build() -> Tokenizer:
    """The tokenizer; the same for every call."""
    specials = [names.BOS, names.PAD, names.EOS, names.UNK, *(names.code_name(c) for c in range(CODEBOOK))]
    specials += [names.IMAGE_END, names.IMAGE_START, names.TURN_END, names.NEW_LINE]
    specials += [names.grid_name(n) for n in GRID_UNITS]
    table = {name: i for i, name in enumerate(specials)}
    tags = [opening + tag + ">" for tag in CHAIN_TAGS for opening in ("<", "</")]
    for text in [*sorted(pre_tokenizers.ByteLevel.alphabet()), *tags]:
        table[text] = len(table)
    for word in _words_by_saving(corpus()):
        if len(table) == VOCABULARY_SIZE:
            break
        table.setdefault(word, len(table))
    tokenizer = Tokenizer(models.BPE(vocab=table, merges=[], unk_token=names.UNK, ignore_merges=True))
    tokenizer.pre_tokenizer = _pre_tokenizer()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in specials])
    return tokenizer


def corpus() -> list[str]:
    """Every text of the prompts and chains of the first training rows."""
    texts = []
    for index in range(CORPUS_ROWS):
        texts += [INSTRUCTION.replace(IMAGE_PLACEHOLDER, ""), *row(index, "train").texts]
    return texts


def _pre_tokenizer() -> pre_tokenizers.PreTokenizer:
    pieces = pre_tokenizers.Split(Regex(_PIECE), behavior="isolated")
    return pre_tokenizers.Sequence([pieces, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _words_by_saving(texts: list[str]) -> list[str]:
    """Words in byte-level spelling, those that save most ids first."""
    split = _pre_tokenizer()
    counts = Counter(word for text in texts for word, _ in split.pre_tokenize_str(text))
    return sorted(counts, key=lambda word: (-counts[word] * (len(word) - 1), word))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    directory = parser.parse_args().directory
    directory.mkdir(parents=True, exist_ok=True)
    build().save(str(directory / "tokenizer.json"))


if __name__ == "__main__":
    main()
