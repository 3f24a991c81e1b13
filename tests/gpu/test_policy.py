"""The policy's log-probs on a GPU: the values of the CPU, and no logits of the whole vocabulary, at real widths."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from benchmarks.logprob_head import Problem
from tests.families import random_policy
from vlcot.grammar import Support
from vlcot.policy.family import Family
from vlcot.policy.logprobs import SupportTable
from vlcot.policy.model import VlcotForCausalLM

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and there is none"),
]
PROMPT, CHAIN, COUNTS = 430, 580, (4, 2, 2)


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> tuple[Family, VlcotForCausalLM]:
    path = tmp_path_factory.mktemp("gpu") / "policy"
    family = random_policy(path, hidden=1024, layers=4)
    return family, VlcotForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="sdpa")


def chain_logprobs(family: Family, model: VlcotForCausalLM, device: str, dtype: torch.dtype) -> torch.Tensor:
    """float32 [B, S] of the same random chains, and their gradients in ``model``."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.from_numpy(family.grammar.support_ids(Support.CODE))
    prompts, chains = (
        codes[torch.randint(len(codes), shape, generator=generator)]
        for shape in ((len(COUNTS), PROMPT), (sum(COUNTS), CHAIN))
    )
    supports = torch.full_like(chains, int(Support.CODE), dtype=torch.uint8)
    model = model.to(device, dtype)
    model.zero_grad()
    table = SupportTable.of(family.grammar, device)
    logprobs = model.chain_logprobs(prompts.to(device), chains.to(device), supports.to(device), COUNTS, table, 0.9)
    logprobs.mean().backward()
    return logprobs.detach().float().cpu()


@pytest.mark.parametrize(("dtype", "mean", "largest"), [(torch.float32, 1e-4, 2e-3), (torch.bfloat16, 0.4, 3.0)])
def test_chains_that_share_prompts_have_the_logprobs_of_the_cpu(family, dtype, mean, largest) -> None:
    """float32 to rounding (TF32 is off by default); bfloat16 as far as its eight bits allow: the logits' standard
    deviation is 10 here, and on a CPU bfloat16 is off by 0.19 in the mean, 0.9 at most and 3 % of the gradient."""
    expected = chain_logprobs(*family, "cpu", torch.float32)
    gradient = {name: p.grad.clone() for name, p in family[1].named_parameters()}
    difference = (chain_logprobs(*family, "cuda", dtype) - expected).abs()
    print(f"{dtype}: mean {difference.mean():.2e}, largest {difference.max():.2e}")
    assert difference.mean() < mean and difference.max() < largest
    for name, parameter in family[1].named_parameters():
        error = (parameter.grad.float().cpu() - gradient[name]).norm()
        assert error <= (1e-3 if dtype == torch.float32 else 0.2) * gradient[name].norm(), name
    family[1].to("cpu", torch.float32)


def peak_mib(side: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], problem: Problem) -> float:
    """Memory on top of inputs and gradients in one forward and backward of the head, bfloat16."""
    inputs = [x.to("cuda", torch.bfloat16).requires_grad_() for x in (problem.hidden, problem.weight)]
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    side(*inputs).sum().backward()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before - sum(x.nbytes for x in inputs)) / 2**20


def test_head_at_the_width_of_the_7b_needs_a_tenth_of_the_memory_but_for_the_weight_gradient() -> None:
    """73,728 ids, width 4,096, one chain of the 512 px layout; the float32 sum of the weight's gradient is left out."""
    problem = Problem(hidden=4096)
    problem.ids, problem.supports = problem.ids.cuda(), problem.supports.cuda()
    problem.table = SupportTable(problem.table.slices, {k: x.cuda() for k, x in problem.table.index.items()})
    full, allowed = (peak_mib(side, problem) for side in (problem.full, problem.allowed))
    allowed -= problem.weight.numel() * 4 / 2**20
    print(f"full vocabulary {full:.0f} MiB, allowed ids {allowed:.0f} MiB")
    assert full > 10 * allowed
