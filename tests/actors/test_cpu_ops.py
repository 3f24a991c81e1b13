"""vLLM's C++ kernels of a norm and an activation against its torch code."""

from __future__ import annotations

import pytest
import torch
from vllm.config import CompilationConfig, CompilationMode, VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.layernorm import RMSNorm

from actors.vllm_plugin import cpu_ops

pytestmark = pytest.mark.unit


@pytest.fixture(scope="module")
def layers():
    """As an engine without the compiler builds them: width -> norm, and the activation."""
    config = VllmConfig(compilation_config=CompilationConfig(mode=CompilationMode.NONE))
    with set_current_vllm_config(config):
        norms = {width: RMSNorm(width, eps=1e-5) for width in (24, 20)}
        yield norms, SiluAndMul()


def test_an_engine_gets_them(layers):
    norms, activation = layers
    assert type(norms[24]) is cpu_ops.CpuRMSNorm and type(activation) is cpu_ops.CpuSiluAndMul
    assert norms[24]._forward_method == norms[24].forward_cpu
    assert activation._forward_method == activation.forward_cpu


@pytest.mark.parametrize(("width", "dtype"), [(24, torch.float32), (20, torch.float32), (24, torch.bfloat16)])
def test_they_are_torchs_results(layers, width, dtype):
    """Rows that the kernels do not take, and bfloat16, in which they round otherwise, go to torch: bit for bit."""
    norms, activation = layers
    norm, generator = norms[width], torch.Generator().manual_seed(0)
    norm.weight.data = torch.rand(width, generator=generator).to(dtype)
    x, residual = (torch.randn(5, width, generator=generator).to(dtype) for _ in range(2))
    exact = dtype is torch.bfloat16 or width % cpu_ops.LANES
    tolerance = {"rtol": 0, "atol": 0} if exact else {"rtol": 1e-6, "atol": 1e-6}
    torch.testing.assert_close(norm.forward_cpu(x.clone()), norm.forward_native(x.clone()), **tolerance)
    ours = norm.forward_cpu(x.clone(), residual.clone())
    torch.testing.assert_close(ours, norm.forward_native(x.clone(), residual.clone()), **tolerance)
    wide = torch.randn(5, 2 * width, generator=generator).to(dtype) * 8
    torch.testing.assert_close(activation.forward_cpu(wide), activation.forward_native(wide), **tolerance)
