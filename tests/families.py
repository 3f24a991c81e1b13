"""A small random policy family, built in a second, for tests that do not need trained weights."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from vlcot import vocabulary as v
from vlcot.policy.config import VlcotConfig
from vlcot.policy.family import Family
from vlcot.policy.model import VlcotForCausalLM
from vlcot.sequence import CHAIN_TAGS, Layout

LAYOUT = Layout(full_size=64, downsample=8, grid_unit_pixels=16)
CODEBOOK = 64
INSTRUCTION = "restore <|image|>"


def byte_tokenizer(codebook: int = CODEBOOK, units: tuple[int, ...] = (1, 2, 4)) -> Tokenizer:
    """Byte-level text of 256 ids, the family's special tokens and ``codebook`` codes; tags are text."""
    specials = [v.BOS, v.PAD, v.EOS, v.UNK, *(v.code_name(c) for c in range(codebook)), v.IMAGE_END, v.IMAGE_START]
    specials += [v.TURN_END, v.NEW_LINE, *(v.grid_name(n) for n in units)]
    table = {name: i for i, name in enumerate(specials)}
    for letter in sorted(pre_tokenizers.ByteLevel.alphabet()):
        table[letter] = len(table)
    tokenizer = Tokenizer(models.BPE(vocab=table, merges=[], unk_token=v.UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in specials])
    tokenizer.add_tokens([AddedToken(f"{o}{t}>", normalized=False) for t in CHAIN_TAGS for o in ("<", "</")])
    return tokenizer


def random_policy(directory: Path, seed: int = 0, hidden: int = 64, layers: int = 2) -> Family:
    """Write a random policy (fp32, with uneven q/k norms) into ``directory``."""
    tokenizer = byte_tokenizer()
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    config = VlcotConfig(
        vocab_size=512,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        num_key_value_heads=hidden // 32,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
        rms_norm_eps=1e-5,
        layout={"full_size": 64, "downsample": 8, "grid_unit_pixels": 16},
        architectures=["VlcotForCausalLM"],
    )
    torch.manual_seed(seed)
    model = VlcotForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight.normal_(0, 0.3)
        for layer in model.model.layers:
            layer.self_attn.q_norm.weight.normal_(1, 0.3)
            layer.self_attn.k_norm.bias.normal_(0, 0.3)
    model.save_pretrained(directory)
    return Family.from_pretrained(directory)
