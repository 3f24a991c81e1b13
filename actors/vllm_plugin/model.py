"""The policy as a vLLM model: Llama with LayerNorm per head on queries and keys (Chameleon, arXiv 2405.09818 §3.2).

Parameter names and arithmetic are those of :mod:`vlcot.policy.model`; log-probs agree to 1e-5 in fp32.
"""

from __future__ import annotations

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.model_executor.models.llama import LlamaAttention, LlamaDecoderLayer, LlamaForCausalLM
from vllm.model_executor.utils import set_weight_attrs

import actors.vllm_plugin.cpu_ops  # noqa: F401  # before a model is built

QK_NORM_EPS = 1e-5  # vlcot.policy.model; importing that module would load the transformers model too


def own_heads(weight: torch.Tensor, heads: int, rank: int, world_size: int) -> torch.Tensor:
    """Rows of the ``heads`` heads that tensor-parallel rank ``rank`` computes, of a tensor [all heads, head_dim].

    Key heads fewer than ranks are replicated, as vLLM's ``QKVParallelLinear`` does.
    """
    return weight.narrow(0, rank * weight.shape[0] // world_size, heads)


def load_own_heads(param: torch.Tensor, loaded_weight: torch.Tensor) -> None:
    """Weight loader of :class:`HeadNorm`."""
    rank, world_size = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
    param.data.copy_(own_heads(loaded_weight, param.shape[0], rank, world_size))


class HeadNorm(nn.Module):
    """LayerNorm over ``head_dim``, affine per head, of this rank's heads. Input [tokens, heads * head_dim]."""

    def __init__(self, heads: int, head_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(heads, head_dim), requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(heads, head_dim), requires_grad=False)
        for param in (self.weight, self.bias):
            set_weight_attrs(param, {"weight_loader": load_own_heads})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads = x.view(*x.shape[:-1], *self.weight.shape)
        normal = nn.functional.layer_norm(heads, (heads.shape[-1],), None, None, QK_NORM_EPS)
        return (normal * self.weight + self.bias).view(x.shape)


class VlcotAttention(LlamaAttention):
    """Llama attention with :class:`HeadNorm` before the rotary embedding."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.q_norm = HeadNorm(self.num_heads, self.head_dim)
        self.k_norm = HeadNorm(self.num_kv_heads, self.head_dim)

    def forward(self, positions: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        qkv, _ = self.qkv_proj(hidden_states)
        q, k, v = qkv.split([self.q_size, self.kv_size, self.kv_size], dim=-1)
        q, k = self.rotary_emb(positions, self.q_norm(q), self.k_norm(k))
        output, _ = self.o_proj(self.attn(q, k, v))
        return output


class VlcotDecoderLayer(LlamaDecoderLayer):
    """Llama decoder layer with :class:`VlcotAttention`."""

    def __init__(self, vllm_config: VllmConfig, prefix: str = "", config=None) -> None:
        super().__init__(vllm_config, prefix, config, attn_layer_type=VlcotAttention)


class VlcotForCausalLM(LlamaForCausalLM):
    """The policy in vLLM."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=VlcotDecoderLayer)
