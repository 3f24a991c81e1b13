"""LoRA adapters of peft on the policy's linear layers (arXiv 2106.09685): W + (alpha / rank) B A, W frozen.

The layers that peft puts in place of ``nn.Linear`` shard, gather and checkpoint under ZeRO-3 like any other. What is
ours is what peft has no word for there: a merged tensor is made from shards that are gathered for it alone, and the
base model is the same model with the adapters scaled to nothing. So every pass visits the same modules, and no second
copy of the weights is held as the reference of the KL.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from learners.spec import LoraSpec

ADAPTER = "default"
"""peft's name of a model's only adapter."""


@dataclass(frozen=True, eq=False)
class Weight:
    """One tensor of the policy, under the name and in the shape that actors and checkpoints know.

    Attributes:
        parameters: what it is made of: itself, or W, A and B. Whole only while they are gathered.
        scaling: alpha / rank; without meaning for a plain tensor.
    """

    parameters: tuple[nn.Parameter, ...]
    scaling: float = 0.0

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole tensor, whatever part of it is here."""
        return tuple(getattr(self.parameters[0], "ds_shape", self.parameters[0].shape))

    @property
    def dtype(self) -> str:
        """As ``float32``."""
        return str(self.parameters[0].dtype).removeprefix("torch.")

    @torch.no_grad()
    def value(self) -> torch.Tensor:
        """The tensor, of gathered parameters; may share their memory. Merged in float32 and rounded once."""
        base, *adapter = self.parameters
        if not adapter or not bool(adapter[1].any()):  # W + 0 would turn -0 into 0
            return base.detach()
        low, high = (factor.float() for factor in adapter)
        return torch.addmm(base.float(), high, low, alpha=self.scaling).to(base.dtype)


def add_adapters(policy: nn.Module, lora: LoraSpec, seed: int) -> None:
    """Freeze ``policy`` and put trainable adapters on ``lora.targets``, A random from ``seed`` and B zero, in place."""
    from peft import LoraConfig, inject_adapter_in_model

    policy.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(LoraConfig(**_settings(lora)), policy)


def base_only(module: nn.Module) -> AbstractContextManager[None]:
    """Inside, ``module`` computes what it would without its adapters."""
    from peft.helpers import rescale_adapter_scale

    return rescale_adapter_scale(module, 0.0)


def weights_of(module: nn.Module) -> dict[str, Weight]:
    """The tensors of ``module`` by their name in a checkpoint, in its order; adapters are merged into them."""
    found: dict[str, Weight] = {}
    for name, layer in module.named_modules():
        if hasattr(layer, "lora_A"):  # not isinstance: without LoRA nothing imports peft
            a, b = (factors[ADAPTER].weight for factors in (layer.lora_A, layer.lora_B))
            found[f"{name}.weight"] = Weight((layer.base_layer.weight, a, b), layer.scaling[ADAPTER])
    named = ((name.replace(".base_layer.", "."), p) for name, p in module.named_parameters() if ".lora_" not in name)
    return {name: found.get(name, Weight((parameter,))) for name, parameter in named}


def write_adapters(
    factors: Mapping[str, torch.Tensor], lora: LoraSpec, base_model: str | Path, directory: Path
) -> None:
    """Write what ``peft.PeftModel.from_pretrained`` reads on top of the policy ``base_model``.

    Args:
        factors: :func:`factors_of` a policy, whole and on the CPU.
    """
    from peft import LoraConfig

    directory.mkdir()
    named = {f"base_model.model.{name.replace(f'.{ADAPTER}.', '.')}": tensor for name, tensor in factors.items()}
    save_file(named, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    LoraConfig(**_settings(lora), base_model_name_or_path=str(base_model)).save_pretrained(str(directory))


def factors_of(module: nn.Module) -> dict[str, Weight]:
    """A and B of every adapter by name."""
    return {name: Weight((parameter,)) for name, parameter in module.named_parameters() if ".lora_" in name}


def _settings(lora: LoraSpec) -> dict[str, Any]:
    return {
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "target_modules": list(lora.targets),
        "lora_dropout": lora.dropout,
        "bias": "none",
    }
