"""Training examples of the cold start: toy rows as ids, encoded once and kept in a file."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from toy.photographs import Split
from toy.rows import INSTRUCTION, LAYOUT, ToyRow, row
from vlcot.grammar import Support
from vlcot.images import upscale_for_policy
from vlcot.policy.family import Family
from vlcot.sequence import SequenceBuilder
from vlcot.tokenizer.image import ImageTokenizer

ENCODE_BATCH = 32


@dataclass(frozen=True, eq=False)
class Example:
    """Prompt and true chain: ``ids`` int32 [L], ``supports`` uint8 [L] (FORCED over the prompt: no loss)."""

    ids: np.ndarray
    supports: np.ndarray


def encode(rows: Sequence[ToyRow], builder: SequenceBuilder, images: ImageTokenizer) -> list[Example]:
    """Rows to examples; every image is tokenised at its own size."""
    lr = images.encode(np.stack([upscale_for_policy(r.lr, LAYOUT.full_size) for r in rows])).numpy()
    targets = [images.encode(np.stack(t)).numpy() for t in zip(*(r.targets() for r in rows), strict=True)]
    examples = []
    for i, r in enumerate(rows):
        prompt = builder.prompt(INSTRUCTION, lr[i])
        chain = builder.chain(r.texts, [codes[i] for codes in targets])
        no_loss = np.full(len(prompt), Support.FORCED, dtype=np.uint8)
        supports = np.concatenate([no_loss, builder.grammar.supports(chain.tolist())])
        examples.append(Example(np.concatenate([prompt, chain]), supports))
    return examples


def load_or_encode(path: Path, count: int, seed: int, policy: Path, vq: Path, processes: int = 2) -> list[Example]:
    """``count`` training examples from ``path``, which is written if absent (remove it when the VQ changes)."""
    if not path.is_file():
        starts = range(0, count, ENCODE_BATCH)
        task = partial(_encode_range, count=count, seed=seed, policy=policy, vq=vq)
        with multiprocessing.get_context("spawn").Pool(processes, torch.set_num_threads, (1,)) as pool:
            examples = [example for part in pool.imap(task, starts) for example in part]
        lengths = [len(example.ids) for example in examples]
        path.parent.mkdir(parents=True, exist_ok=True)
        ids = np.concatenate([example.ids for example in examples])
        supports = np.concatenate([example.supports for example in examples])
        np.savez(path, ids=ids, supports=supports, ends=np.cumsum(lengths))
    with np.load(path) as data:
        pieces = zip(*(np.split(data[name], data["ends"][:-1]) for name in ("ids", "supports")), strict=True)
        return [Example(ids, supports) for ids, supports in pieces]


_loaded: dict[tuple[Path, Path], tuple[SequenceBuilder, ImageTokenizer]] = {}


def _encode_range(start: int, count: int, seed: int, policy: Path, vq: Path, split: Split = "train") -> list[Example]:
    if (policy, vq) not in _loaded:  # once per worker process
        _loaded[policy, vq] = Family.from_pretrained(policy).builder, ImageTokenizer.from_pretrained(vq)
    rows = [row(i, split, seed) for i in range(start, min(start + ENCODE_BATCH, count))]
    return encode(rows, *_loaded[policy, vq])


def batches(
    examples: Sequence[Example], batch_size: int, pad: int, rng: np.random.Generator
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless right-padded batches, ids int64 [B, L] and supports uint8 [B, L]; each epoch in a new order.

    Examples of similar length share a batch: every 16 batches are drawn at random, then sorted by length.
    """
    while True:
        order = rng.permutation(len(examples))
        for start in range(0, len(order), 16 * batch_size):
            window = sorted(order[start : start + 16 * batch_size].tolist(), key=lambda i: len(examples[i].ids))
            chunks = [window[i : i + batch_size] for i in range(0, len(window), batch_size)]
            for index in rng.permutation(len(chunks)).tolist():
                yield pad_batch([examples[i] for i in chunks[index]], pad)


def pad_batch(examples: Sequence[Example], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids int64 [B, L] filled up with ``pad``, and supports uint8 [B, L] filled up with FORCED."""
    length = max(len(example.ids) for example in examples)
    ids = np.full((len(examples), length), pad, dtype=np.int64)
    supports = np.full((len(examples), length), Support.FORCED, dtype=np.uint8)
    for i, example in enumerate(examples):
        ids[i, : len(example.ids)] = example.ids
        supports[i, : len(example.supports)] = example.supports
    return torch.from_numpy(ids), torch.from_numpy(supports)
