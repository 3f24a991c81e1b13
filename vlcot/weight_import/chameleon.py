"""Lumina-mGPT and PURE (Chameleon architecture) to our policy.

Names and shapes: ``modeling_chameleon.py`` of the public Lumina-mGPT and PURE repositories; see domain.md §2.1, §3.3.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch

from vlcot.sequence import Layout
from vlcot.vocabulary import Vocabulary
from vlcot.weight_import.code_map import CODEBOOK, describe, read_vocabulary
from vlcot.weight_import.convert import Conversion, Plan
from vlcot.weight_import.source import Checkpoint, ImportRefused, read_json

VISION_PREFIX = "model.vqmodel."
"""Chameleon's own image tokenizer (29.4 M values); ours is LlamaGen's, a model by itself."""
MAX_POSITIONS = 11_776
"""``--max_seq_len`` of PURE and RealSR-R1; rotary embeddings have no table, so this is a bound only."""
GROWTH_SEED = 0
REQUIRED = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "tie_word_embeddings": False}


@dataclass(frozen=True)
class ChameleonConfig:
    """What the layout of the tensors depends on. Defaults: the class defaults of the published configuration."""

    vocab_size: int = 65_536
    hidden_size: int = 4096
    intermediate_size: int = 11_008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 32
    model_parallel_size: int = 1
    rms_norm_eps: float = 1e-5
    max_position_embeddings: int = 4096
    rope_theta: float = 10_000.0

    @classmethod
    def read(cls, path: Path) -> ChameleonConfig:
        """Read a published ``config.json``.

        Raises:
            ImportRefused: of another architecture, or with a setting that our policy does not have.
        """
        raw = read_json(path)
        if "chameleon" not in str(raw.get("model_type", "")):
            raise ImportRefused(f"{path}: model_type is {raw.get('model_type')!r}; 'chameleon' needed")
        for key, value in (REQUIRED | {"swin_norm": False, "rope_scaling": None}).items():
            if raw.get(key, value) != value:
                raise ImportRefused(f"{path}: {key} is {raw[key]!r}; our policy has only {value!r}")
        rope = raw.get("rope_parameters") or {}
        if rope.get("rope_type", "default") != "default":
            raise ImportRefused(f"{path}: rope_type is {rope['rope_type']!r}; our policy has only 'default'")
        values = rope | raw
        config = cls(**{f.name: values[f.name] for f in fields(cls) if values.get(f.name) is not None})
        for name, value in asdict(config).items():
            kind = int if isinstance(getattr(cls, name), int) else int | float
            if isinstance(value, bool) or not isinstance(value, kind) or value <= 0:
                raise ImportRefused(f"{path}: {name} is {value!r}; a positive number needed")
        if config.hidden_size % config.num_attention_heads:
            raise ImportRefused(f"{path}: hidden_size is not a multiple of num_attention_heads")
        for heads in (config.num_attention_heads, config.num_key_value_heads):
            if heads % config.model_parallel_size:
                raise ImportRefused(f"{path}: {heads} heads do not divide into model_parallel_size")
        return config

    @property
    def head_dim(self) -> int:
        """Channels of a head."""
        return self.hidden_size // self.num_attention_heads


def policy_plan(
    checkpoint: Checkpoint, tokenizer: Path, codebook: int = CODEBOOK, layout: Layout | None = None
) -> Plan:
    """Plan the import of a Chameleon checkpoint, whose ``config.json`` lies beside the weights.

    The embedding grows to the tokenizer's image ids (65,536 to 73,728 rows for Lumina-mGPT with PURE's tokenizer).

    Args:
        checkpoint: the opened source.
        tokenizer: token table of the result; copied as ``tokenizer.json``.
        codebook: number of image codes.
        layout: image sizes of the result; PURE's unless given.

    Raises:
        ImportRefused: a configuration or tokenizer of another family.
    """
    folder = checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent
    config = ChameleonConfig.read(folder / "config.json")
    layout = layout or Layout()
    vocabulary = read_vocabulary(tokenizer, config.vocab_size, codebook)
    try:
        layout.grammar(vocabulary)
    except ValueError as error:
        raise ImportRefused(f"{tokenizer}: {error}") from error
    return Plan(
        conversions=conversions(config, vocabulary),
        dropped=lambda name: name.startswith(VISION_PREFIX),
        config=_our_config(config, vocabulary.size, layout, checkpoint),
        notes=_notes(config, vocabulary),
        copies={"tokenizer.json": tokenizer},
    )


def conversions(config: ChameleonConfig, vocabulary: Vocabulary) -> dict[str, Conversion]:
    """Every tensor of the decoder, by name (the names stay)."""
    hidden, wide, d = config.hidden_size, config.intermediate_size, config.head_dim
    query, key = config.num_attention_heads, config.num_key_value_heads
    table = {name: _grown(name, config, vocabulary) for name in ("model.embed_tokens.weight", "lm_head.weight")}
    plain: dict[str, tuple[int, ...]] = {"model.norm.weight": (hidden,)}
    for layer in (f"model.layers.{n}" for n in range(config.num_hidden_layers)):
        plain |= {
            f"{layer}.self_attn.q_proj.weight": (query * d, hidden),
            f"{layer}.self_attn.k_proj.weight": (key * d, hidden),
            f"{layer}.self_attn.v_proj.weight": (key * d, hidden),
            f"{layer}.self_attn.o_proj.weight": (hidden, query * d),
            f"{layer}.mlp.gate_proj.weight": (wide, hidden),
            f"{layer}.mlp.up_proj.weight": (wide, hidden),
            f"{layer}.mlp.down_proj.weight": (hidden, wide),
            f"{layer}.input_layernorm.weight": (hidden,),
            f"{layer}.post_attention_layernorm.weight": (hidden,),
        }
        for norm, heads in (("q_norm", query), ("k_norm", key)):
            for part in ("weight", "bias"):
                name = f"{layer}.self_attn.{norm}.{part}"
                shapes = ((config.model_parallel_size, d), (heads, d))
                table[name] = Conversion(name, shapes, (heads, d), partial(repeat_rows, heads=heads))
    return table | {name: Conversion(name, (shape,), shape) for name, shape in plain.items()}


def repeat_rows(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """q/k-norm of each head: rows [R, d] of R tensor-parallel ranks -> [heads, d]; a rank's heads are neighbours."""
    return rows.repeat_interleave(heads // rows.shape[0], dim=0)


def grow_embedding(rows: torch.Tensor, size: int, image_ids: torch.Tensor) -> torch.Tensor:
    """Input embedding [S, d] -> [size, d]: new rows are normal, per channel as the rows of the known image ids.

    Drawn in float32 with a fixed seed, so that an import can be repeated and checked.
    """
    known = rows[image_ids].float()
    noise = torch.randn(size - rows.shape[0], rows.shape[1], generator=torch.Generator().manual_seed(GROWTH_SEED))
    new = known.mean(0) + known.std(0) * noise
    return torch.cat([rows, new.to(rows.dtype)])


def grow_head(rows: torch.Tensor, size: int, image_ids: torch.Tensor) -> torch.Tensor:
    """Output rows [S, d] -> [size, d]: new rows are the mean of the known image ids' rows.

    A new code's logit then is the mean logit of the known ones: none is preferred, none is shut out.
    """
    mean = rows[image_ids].float().mean(0, keepdim=True).to(rows.dtype)
    return torch.cat([rows, mean.expand(size - rows.shape[0], -1)])


def _grown(name: str, config: ChameleonConfig, vocabulary: Vocabulary) -> Conversion:
    source, target = (config.vocab_size, config.hidden_size), (vocabulary.size, config.hidden_size)
    if source == target:
        return Conversion(name, (source,), target)
    known = torch.from_numpy(vocabulary.image_ids[vocabulary.image_ids < config.vocab_size])
    grow = grow_head if name.startswith("lm_head") else grow_embedding
    return Conversion(name, (source,), target, partial(grow, size=vocabulary.size, image_ids=known))


def _our_config(
    config: ChameleonConfig, vocabulary_size: int, layout: Layout, checkpoint: Checkpoint
) -> Mapping[str, Any]:
    head = checkpoint.tensors.get("lm_head.weight")
    return REQUIRED | {
        "architectures": ["VlcotForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "dtype": str(head.dtype).removeprefix("torch.") if head else "float32",
        "eos_token_id": 2,
        "head_dim": config.head_dim,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "layout": asdict(layout),
        "max_position_embeddings": max(config.max_position_embeddings, MAX_POSITIONS),
        "model_type": "vlcot",
        "num_attention_heads": config.num_attention_heads,
        "num_hidden_layers": config.num_hidden_layers,
        "num_key_value_heads": config.num_key_value_heads,
        "pad_token_id": 1,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_parameters": {"rope_theta": config.rope_theta, "rope_type": "default"},
        "vocab_size": vocabulary_size,
    }


def _notes(config: ChameleonConfig, vocabulary: Vocabulary) -> tuple[str, ...]:
    notes = [
        "Names stay. q/k-norm rows are repeated to one per head.",
        f"Dropped: tensors named `{VISION_PREFIX}*`, Chameleon's own image tokenizer.",
        describe(vocabulary),
    ]
    if vocabulary.size > config.vocab_size:
        known = int((vocabulary.image_ids < config.vocab_size).sum())
        notes.append(
            f"Embedding and head grown from {config.vocab_size:,} to {vocabulary.size:,} rows. New embedding rows: "
            f"normal, with mean and standard deviation per channel of the {known:,} known image rows (float32, seed "
            f"{GROWTH_SEED}). New head rows: the mean of the {known:,} known image rows. They know nothing yet: "
            "cold-start before use."
        )
    return tuple(notes)
