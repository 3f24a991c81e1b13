"""LlamaGen's VQ image tokenizers (``vq_ds8_c2i.pt``, ``vq_ds16_c2i.pt``) to transformers' JanusVQVAE.

Names and shapes: ``tokenizer/tokenizer_image/vq_model.py`` of the public LlamaGen repository; domain.md §3.1, §3.2.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from vlcot.weight_import.code_map import CODEBOOK
from vlcot.weight_import.convert import Conversion, Plan
from vlcot.weight_import.source import ImportRefused

CODEBOOK_ROWS = "quantize.embedding.weight"
USAGE_BUFFER = "quantize.codebook_used"
"""A training statistic, left out. Checkpoints trained without ``show_usage`` do not have it."""
FULL_SIZE = 512  # pixels; JanusVQVAE's own `decode` knows one grid size

Entry = tuple[str, str, tuple[int, ...]]  # name there, name here, shape


@dataclass(frozen=True)
class VqConfig:
    """What the layout of the tensors depends on. Defaults: LlamaGen's."""

    channel_multiplier: tuple[int, ...]
    base_channels: int = 128
    num_res_blocks: int = 2
    latent_channels: int = 256
    embed_dim: int = 8
    codebook: int = CODEBOOK

    @property
    def downsample(self) -> int:
        """Pixels per code along a side."""
        return 2 ** (len(self.channel_multiplier) - 1)


VQ_8 = VqConfig((1, 2, 2, 4))
VQ_16 = VqConfig((1, 1, 2, 2, 4))


def vq_plan(config: VqConfig) -> Plan:
    """Plan the import of a LlamaGen VQ of this configuration. Everything becomes float32."""
    return Plan(
        conversions={
            source: Conversion(target, (shape,), shape, unit_rows if source == CODEBOOK_ROWS else None, torch.float32)
            for source, target, shape in tensors(config)
        },
        dropped=lambda name: name == USAGE_BUFFER,
        config=_janus_config(config),
        notes=(
            "Renamed to JanusVQVAE's names (docs/import-weights.md).",
            "Rows of the codebook are L2-normalised: LlamaGen searches by angle, JanusVQVAE by distance.",
            "Stored as float32. The search must run in float32: in bfloat16 it finds other codes.",
            f"Dropped if present: `{USAGE_BUFFER}`, a training statistic.",
        ),
    )


def unit_rows(codebook: torch.Tensor) -> torch.Tensor:
    """Codebook [K, D] with rows of length 1, in float32.

    Raises:
        ImportRefused: a row of length 0 has no direction.
    """
    lengths = codebook.float().norm(dim=-1)
    if not lengths.all():
        raise ImportRefused(f"tensor '{CODEBOOK_ROWS}': row {int(lengths.argmin())} is all zeros")
    return F.normalize(codebook.float(), dim=-1)


def tensors(config: VqConfig) -> Iterator[Entry]:
    """Every tensor: its name in LlamaGen, its name in JanusVQVAE, its shape."""
    levels, base, latent = len(config.channel_multiplier), config.base_channels, config.latent_channels
    widths = [base * m for m in config.channel_multiplier]
    yield from _conv("encoder.conv_in", "encoder.conv_in", 3, base, 3)
    channels = base
    for i, width in enumerate(widths):
        there, here = f"encoder.conv_blocks.{i}", f"encoder.down.{i}"
        yield from _level(there, here, channels, width, config.num_res_blocks, attention=i == levels - 1)
        channels = width
        if i < levels - 1:
            yield from _conv(f"{there}.downsample.conv", f"{here}.downsample.conv", channels, channels, 3)
    yield from _middle("encoder", channels)
    yield from _norm("encoder.norm_out", "encoder.norm_out", channels)
    yield from _conv("encoder.conv_out", "encoder.conv_out", channels, latent, 3)

    yield from _conv("decoder.conv_in", "decoder.conv_in", latent, channels, 3)
    yield from _middle("decoder", channels)
    for k, width in enumerate(reversed(widths)):  # 0 is the lowest resolution
        there, here = f"decoder.conv_blocks.{k}", f"decoder.up.{k}"
        yield from _level(there, here, channels, width, config.num_res_blocks + 1, attention=k == 0)
        channels = width
        if k < levels - 1:
            yield from _conv(f"{there}.upsample.conv", f"{here}.upsample.conv", channels, channels, 3)
    yield from _norm("decoder.norm_out", "decoder.norm_out", channels)
    yield from _conv("decoder.conv_out", "decoder.conv_out", channels, 3, 3)

    yield from _conv("quant_conv", "quant_conv", latent, config.embed_dim, 1)
    yield from _conv("post_quant_conv", "post_quant_conv", config.embed_dim, latent, 1)
    yield CODEBOOK_ROWS, CODEBOOK_ROWS, (config.codebook, config.embed_dim)


def _level(there: str, here: str, channels: int, width: int, blocks: int, attention: bool) -> Iterator[Entry]:
    for j in range(blocks):
        yield from _residual(f"{there}.res.{j}", f"{here}.block.{j}", width if j else channels, width)
        if attention:
            yield from _attention(f"{there}.attn.{j}", f"{here}.attn.{j}", width)


def _middle(side: str, channels: int) -> Iterator[Entry]:
    yield from _residual(f"{side}.mid.0", f"{side}.mid.block_1", channels, channels)
    yield from _attention(f"{side}.mid.1", f"{side}.mid.attn_1", channels)
    yield from _residual(f"{side}.mid.2", f"{side}.mid.block_2", channels, channels)


def _residual(there: str, here: str, channels: int, width: int) -> Iterator[Entry]:
    yield from _norm(f"{there}.norm1", f"{here}.norm1", channels)
    yield from _conv(f"{there}.conv1", f"{here}.conv1", channels, width, 3)
    yield from _norm(f"{there}.norm2", f"{here}.norm2", width)
    yield from _conv(f"{there}.conv2", f"{here}.conv2", width, width, 3)
    if channels != width:
        yield from _conv(f"{there}.nin_shortcut", f"{here}.nin_shortcut", channels, width, 1)


def _attention(there: str, here: str, channels: int) -> Iterator[Entry]:
    yield from _norm(f"{there}.norm", f"{here}.norm", channels)
    for part in ("q", "k", "v", "proj_out"):
        yield from _conv(f"{there}.{part}", f"{here}.{part}", channels, channels, 1)


def _norm(there: str, here: str, channels: int) -> Iterator[Entry]:
    yield f"{there}.weight", f"{here}.weight", (channels,)
    yield f"{there}.bias", f"{here}.bias", (channels,)


def _conv(there: str, here: str, channels: int, width: int, kernel: int) -> Iterator[Entry]:
    yield f"{there}.weight", f"{here}.weight", (width, channels, kernel, kernel)
    yield f"{there}.bias", f"{here}.bias", (width,)


def _janus_config(config: VqConfig) -> dict[str, Any]:
    return {
        "architectures": ["JanusVQVAE"],
        "base_channels": config.base_channels,
        "channel_multiplier": list(config.channel_multiplier),
        "double_latent": False,
        "dropout": 0.0,
        "dtype": "float32",
        "embed_dim": config.embed_dim,
        "in_channels": 3,
        "latent_channels": config.latent_channels,
        "model_type": "janus_vqgan",
        "num_embeddings": config.codebook,
        "num_patches": FULL_SIZE // config.downsample,
        "num_res_blocks": config.num_res_blocks,
        "out_channels": 3,
    }
