"""Policies with random weights, of a chosen vocabulary and width, that write what a benchmark needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import JanusVQVAE, JanusVQVAEConfig

from vlcot import vocabulary as v
from vlcot.policy.config import VlcotConfig
from vlcot.policy.family import Family
from vlcot.policy.model import VlcotForCausalLM
from vlcot.sequence import Layout

REAL_SIZE, REAL_CODES = 73_728, 16_384
NEVER = 1e-9


@dataclass(frozen=True)
class Width:
    """Of the decoder."""

    hidden: int
    layers: int
    heads: int
    positions: int


def real_table() -> dict[str, int]:
    """Names and ids of the 7B's 73,728 ids, with words of no meaning."""
    table = {v.BOS: 0, v.PAD: 1, v.EOS: 2, v.UNK: 3, v.IMAGE_END: 8196, v.IMAGE_START: 8197}
    table |= {f"<reserved{n:05d}>": n + 4 for n in range(8194, 8865)}
    table |= {v.code_name(c): c + 4 if c < 8192 else c + 57344 for c in range(REAL_CODES)}
    return table | _words(range(8869, 65536))


def small_table(size: int, codes: int, units: tuple[int, ...]) -> dict[str, int]:
    """The same names at small ids; whatever ``size`` leaves is words."""
    names = [v.BOS, v.PAD, v.EOS, v.UNK, v.IMAGE_END, v.IMAGE_START, v.TURN_END, v.NEW_LINE]
    names += [*(v.grid_name(n) for n in units), *(v.code_name(c) for c in range(codes))]
    return {name: i for i, name in enumerate(names)} | _words(range(len(names), size))


def _words(ids: range) -> dict[str, int]:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    return {letters[n] if n < len(letters) else f"word{n}": i for n, i in enumerate(ids)}


def write_policy(
    directory: Path, table: Mapping[str, int], size: int, layout: Layout, width: Width, image_start: float
) -> Family:
    """A policy whose chains never end by themselves.

    Args:
        size: rows of embedding and head.
        image_start: probability, about, that a text position begins an image.
    """
    tokenizer = Tokenizer(models.BPE(vocab=dict(table), merges=[], unk_token=v.UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    directory.mkdir(parents=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    config = VlcotConfig(
        vocab_size=size,
        hidden_size=width.hidden,
        intermediate_size=4 * width.hidden,
        num_hidden_layers=width.layers,
        num_attention_heads=width.heads,
        num_key_value_heads=width.heads,
        max_position_embeddings=width.positions,
        tie_word_embeddings=False,
        layout=asdict(layout),
        architectures=["VlcotForCausalLM"],
    )
    torch.manual_seed(0)
    model = VlcotForCausalLM(config)
    vocabulary = v.Vocabulary.from_token_table(table, size)
    ends = (vocabulary.turn_end, vocabulary.bos, vocabulary.pad, vocabulary.eos)  # also where no grammar forbids them
    _set_odds(model, vocabulary, {vocabulary.image_start: image_start} | dict.fromkeys(ends, NEVER))
    model.save_pretrained(directory)
    return Family.from_pretrained(directory)


@torch.no_grad()
def _set_odds(model: VlcotForCausalLM, vocabulary: v.Vocabulary, odds: Mapping[int, float]) -> None:
    """Probabilities of some ids against all text, through a component that every hidden state keeps."""
    embedding, head = model.model.embed_tokens.weight, model.lm_head.weight
    embedding.normal_(0, 1)
    embedding[:, 0] += 6
    ids = torch.randint(0, len(embedding), (1, 64))
    kept = model.model(input_ids=ids).last_hidden_state[..., 0].mean()
    others = torch.tensor(float(len(vocabulary.text_ids))).log()
    for token, probability in odds.items():
        head[token].zero_()
        head[token, 0] = (others + torch.tensor(probability / (1 - probability)).log()) / kept


def write_image_tokenizer(directory: Path, codes: int) -> None:
    """A small VQ with random weights, 8 pixels a code."""
    torch.manual_seed(0)
    config = JanusVQVAEConfig(
        embed_dim=8,
        num_embeddings=codes,
        latent_channels=32,
        base_channels=32,
        channel_multiplier=[1, 1, 1, 1],
        num_res_blocks=1,
        num_patches=8,
    )
    JanusVQVAE(config).save_pretrained(directory)
