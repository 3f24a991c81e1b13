"""VQ image tokenizer: photographs to codes and back, around transformers' JanusVQVAE (LlamaGen's VQ)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F
from transformers.models.janus.modeling_janus import JanusVQVAE


class ImageTokenizer:
    """Encodes uint8 images of any size that is a multiple of `downsample`, and decodes codes.

    Latents and codebook rows are L2-normalised and the nearest row is searched in float32, as LlamaGen trains its
    codebook; JanusVQVAE's own search does neither, and in bfloat16 picks other codes (domain.md 0.3, 3.2).

    Attributes:
        downsample: pixels per code along a side.
        codebook_size: number of codes.
    """

    def __init__(self, model: JanusVQVAE) -> None:
        self.model = apply_norm_groups(model).eval().requires_grad_(False)
        self.codebook = F.normalize(model.quantize.embedding.weight.float(), dim=-1)
        self.downsample: int = 2 ** (len(model.config.channel_multiplier) - 1)
        self.codebook_size: int = self.codebook.shape[0]

    @classmethod
    def from_pretrained(cls, path: str | Path, device: str | torch.device = "cpu") -> ImageTokenizer:
        """Load a JanusVQVAE folder (config.json, model.safetensors) as float32.

        Raises:
            FileNotFoundError: no such folder, or it has no config.json.
        """
        if not (Path(path) / "config.json").is_file():
            raise FileNotFoundError(f"no VQ checkpoint at {path}: config.json is missing")
        model = JanusVQVAE.from_pretrained(str(path), dtype=torch.float32, local_files_only=True)
        return cls(model.to(device))  # type: ignore[arg-type]  # transformers wraps `to` without its types

    @torch.no_grad()
    def encode(self, images: np.ndarray | torch.Tensor) -> torch.Tensor:
        """Codes int64 [B, H/f, W/f] of images uint8 [B, H, W, 3] (RGB), f = downsample. Pixels map to [-1, 1].

        Raises:
            ValueError: wrong dtype or shape, or a side that is no positive multiple of f.
        """
        pixels = torch.as_tensor(images, device=self.codebook.device)
        if pixels.dtype != torch.uint8 or pixels.ndim != 4 or pixels.shape[-1] != 3:
            raise ValueError(f"images must be uint8 [B, H, W, 3], got {pixels.dtype} {list(pixels.shape)}")
        height, width = pixels.shape[1:3]
        if height % self.downsample or width % self.downsample or not height * width:
            raise ValueError(f"image sides must be multiples of {self.downsample}, got {height}x{width}")
        latents = self.model.quant_conv(self.model.encoder(to_signal(pixels)))
        return nearest_codes(latents, self.codebook)

    @torch.no_grad()
    def decode(self, codes: np.ndarray | torch.Tensor) -> torch.Tensor:
        """Images uint8 [B, h*f, w*f, 3] of codes int64 [B, h, w]; values are rounded to nearest (PURE truncates).

        Raises:
            ValueError: wrong dtype or shape, or a code outside [0, codebook_size).
        """
        codes = torch.as_tensor(codes, device=self.codebook.device)
        if codes.dtype != torch.int64 or codes.ndim != 3 or not codes.numel():
            raise ValueError(f"codes must be int64 [B, h, w], got {codes.dtype} {list(codes.shape)}")
        if codes.min() < 0 or codes.max() >= self.codebook_size:
            raise ValueError(
                f"codes must be in [0, {self.codebook_size}), got {codes.min().item()} to {codes.max().item()}"
            )
        # Straight to the decoder: JanusVQVAE.decode knows only the one grid size of its config.
        quantised = F.embedding(codes, self.codebook).permute(0, 3, 1, 2)
        return to_pixels(self.model.decoder(self.model.post_quant_conv(quantised)))


def apply_norm_groups(model: JanusVQVAE) -> JanusVQVAE:
    """Set the groups of every GroupNorm to the config's `norm_groups`, when it has one (JanusVQVAE: 32).

    A small model needs fewer: with one channel per group each layer would erase an image's brightness and colour.
    """
    groups = getattr(model.config, "norm_groups", 32)
    for module in model.modules():
        if isinstance(module, torch.nn.GroupNorm):
            module.num_groups = groups
    return model


def nearest_codes(latents: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """Indices int64 [B, h, w] of the rows of codebook [K, D] closest in angle to latents [B, D, h, w], in float32.

    The rows must be L2-normalised float32. For unit vectors the smallest distance is the largest inner product,
    which does not depend on the latent's length.
    """
    flat = latents.float().permute(0, 2, 3, 1)
    return (F.normalize(flat, dim=-1) @ codebook.T).argmax(dim=-1)


def to_signal(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 [B, H, W, 3] to float32 [B, 3, H, W] in [-1, 1]."""
    return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1.0


def to_pixels(signal: torch.Tensor) -> torch.Tensor:
    """float [B, 3, H, W] to uint8 [B, H, W, 3]: clamped to [-1, 1], then rounded to nearest."""
    return ((signal.float().clamp(-1, 1) + 1.0) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()
