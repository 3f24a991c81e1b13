"""Training examples of the cold start: toy rows as ids, encoded once and kept in a file.

An example is a whole chain or an opening, a prompt with the texts before the first image: an opening costs a fraction
of a chain to encode and to learn from, and the degradation takes far more examples to read than the rest.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from toy.rows import INSTRUCTION, LAYOUT, ToyRow, row
from vlcot.examples import chain_examples
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
    encoded = chain_examples(
        INSTRUCTION, [r.lr for r in rows], [r.hq for r in rows], [r.texts for r in rows], builder, images
    )
    examples = []
    for whole in encoded:
        no_loss = np.full(len(whole.prompt), Support.FORCED, dtype=np.uint8)
        supports = np.concatenate([no_loss, builder.grammar.supports(whole.answer.tolist())])
        examples.append(Example(np.concatenate([whole.prompt, whole.answer]), supports))
    return examples


def encode_openings(rows: Sequence[ToyRow], builder: SequenceBuilder, images: ImageTokenizer) -> list[Example]:
    """Rows to examples that end where the coarse image would start."""
    lr = images.encode(np.stack([upscale_for_policy(r.lr, LAYOUT.full_size) for r in rows])).numpy()
    blank = [np.zeros((s // LAYOUT.downsample,) * 2, dtype=np.int64) for s in LAYOUT.image_sizes]
    examples = []
    for codes, r in zip(lr, rows, strict=True):
        prompt = builder.prompt(INSTRUCTION, codes)
        chain = builder.chain(r.texts, blank)
        supports = builder.grammar.supports(chain.tolist())
        text = np.flatnonzero(supports != Support.FORCED)
        # The choices before the first image are in one run.
        end = text[np.argmax(np.diff(text) > 1)] + 1
        no_loss = np.full(len(prompt), Support.FORCED, dtype=np.uint8)
        examples.append(Example(np.concatenate([prompt, chain[:end]]), np.concatenate([no_loss, supports[:end]])))
    return examples


@dataclass(frozen=True)
class Pool:
    """What a pool of examples is made from: `chains` rows whole, then `openings` rows more, of the training split."""

    chains: int
    openings: int
    seed: int
    policy: Path
    vq: Path

    def load_or_encode(self, path: Path, processes: int = 2) -> tuple[list[Example], list[Example]]:
        """Chains and openings from `path`, which is written when absent or made with other settings or another VQ."""
        made_from = json.dumps(
            [self.chains, self.openings, self.seed]
            + [_sha256(f) for f in (self.vq / "model.safetensors", self.policy / "tokenizer.json")]
        )
        if path.is_file():
            with np.load(path) as data:
                if str(data["made_from"]) == made_from:
                    pieces = (np.split(data[name], data["ends"][:-1]) for name in ("ids", "supports"))
                    examples = [Example(ids, supports) for ids, supports in zip(*pieces, strict=True)]
                    return examples[: self.chains], examples[self.chains :]
        examples = self._encode(processes)
        path.parent.mkdir(parents=True, exist_ok=True)
        ids, supports = (np.concatenate([getattr(e, name) for e in examples]) for name in ("ids", "supports"))
        ends = np.cumsum([len(e.ids) for e in examples])
        np.savez(path, ids=ids, supports=supports, ends=ends, made_from=made_from)
        return examples[: self.chains], examples[self.chains :]

    def _encode(self, processes: int) -> list[Example]:
        count = self.chains + self.openings
        # No part holds both kinds.
        starts = [*range(0, self.chains, ENCODE_BATCH), *range(self.chains, count, ENCODE_BATCH)]
        with multiprocessing.get_context("spawn").Pool(processes, torch.set_num_threads, (1,)) as workers:
            return [example for part in workers.imap(self._encode_part, starts) for example in part]

    def _encode_part(self, start: int) -> list[Example]:
        whole = start < self.chains
        stop = min(start + ENCODE_BATCH, self.chains if whole else self.chains + self.openings)
        rows = [row(i, "train", self.seed) for i in range(start, stop)]
        return (encode if whole else encode_openings)(rows, *_load_encoders(self.policy, self.vq))


@lru_cache(maxsize=1)
def _load_encoders(policy: Path, vq: Path) -> tuple[SequenceBuilder, ImageTokenizer]:
    """Once per worker process."""
    return Family.from_pretrained(policy).builder, ImageTokenizer.from_pretrained(vq)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


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
