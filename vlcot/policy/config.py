"""Configuration of the policy."""

from __future__ import annotations

from transformers import AutoConfig, LlamaConfig


class VlcotConfig(LlamaConfig):
    """A Llama decoder with LayerNorm per head on queries and keys (Chameleon, arXiv 2405.09818 §3.2).

    ``num_key_value_heads`` may differ from the query heads; layer norms are affine per head, eps 1e-5.
    """

    model_type = "vlcot"


def register() -> None:
    """Let ``AutoConfig`` read our ``config.json`` (idempotent)."""
    AutoConfig.register(VlcotConfig.model_type, VlcotConfig, exist_ok=True)


register()
