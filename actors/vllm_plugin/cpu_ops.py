"""Two small operations of vLLM that have C++ kernels on a CPU too, and are not sent to them.

vLLM leaves norms and activations to torch there, for its compiler to fuse. Uncompiled, as the rollout runs on a CPU, a
norm is seven kernels of torch. Importing this module before a model is built replaces both classes on a CPU (vLLM's
``register_oot``). In float32 only: in bfloat16 the kernels round once where torch, and the learner, round twice.
"""

from __future__ import annotations

import torch
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.platforms import current_platform

LANES = 8
"""The kernels want rows of a multiple of this."""


class CpuRMSNorm(RMSNorm):
    """``x + residual``, then ``x / sqrt(mean(x^2) + eps) * weight`` over the last dimension, one kernel."""

    def forward_cpu(
        self, x: torch.Tensor, residual: torch.Tensor | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """The norm of ``x`` [tokens, hidden]; with ``residual`` both are overwritten: norm and sum."""
        if x.dtype != torch.float32 or x.shape[-1] % LANES:
            return self.forward_native(x, residual)
        weight, eps = self.weight.data, self.variance_epsilon
        if residual is None:
            out = torch.empty_like(x)
            torch.ops._C.rms_norm(out, x, weight, eps)
            return out
        torch.ops._C.fused_add_rms_norm(x, residual, weight, eps)
        return x, residual


class CpuSiluAndMul(SiluAndMul):
    """``silu(x[:, :d]) * x[:, d:]``, one kernel."""

    def forward_cpu(self, x: torch.Tensor) -> torch.Tensor:
        """[tokens, 2 * d] -> [tokens, d]."""
        if x.dtype != torch.float32 or x.shape[-1] % (2 * LANES):
            return self.forward_native(x)
        out = x.new_empty(*x.shape[:-1], x.shape[-1] // 2)
        torch.ops._C.silu_and_mul(out, x)
        return out


if current_platform.is_cpu():
    RMSNorm.register_oot(CpuRMSNorm)
    SiluAndMul.register_oot(CpuSiluAndMul)
