"""The learner's forward and backward with one prompt for a group, against the prompt repeated: `python -m
benchmarks.shared_prompt`.

A group of 8 with the 7B's proportions. What sharing saves hangs on the shares of prompt and chain and on those of
attention and linear layers, which follow from length over width; so lengths and width are the 7B's over ``--scale`` (4:
prompt 1,075, chain 1,450 tokens, width 1,024), with two layers and a head of the toy's vocabulary, since the 7B's takes
1 % of its arithmetic. The plain side is one batch of whole sequences with torch's causal attention. Rounds in turn; the
limit is the ratio of multiplications, for this model and for the 7B.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.figures import machine, output_option, write
from vlcot.grammar import Support
from vlcot.policy.config import VlcotConfig
from vlcot.policy.family import Family
from vlcot.policy.logprobs import SupportTable
from vlcot.policy.model import VlcotForCausalLM

PROMPT, CHAIN, GROUP = 4300, 5800, 8
WIDTH, INNER, HEADS, LAYERS = 4096, 11008, 32, 32
"""Of the 7B (Lumina-mGPT, Chameleon)."""


def multiplications(width: int, inner: int, prompt: int, chain: int, *, shared: bool) -> float:
    """Of one layer's forward on a group; backward is in proportion."""
    prompts = 1 if shared else GROUP
    linear = (4 * width**2 + 3 * width * inner) * (prompts * prompt + GROUP * chain)
    pairs = prompts * prompt**2 / 2 + GROUP * chain * (prompt + chain / 2)
    return linear + 2 * width * pairs


def limit(width: int, inner: int, prompt: int, chain: int) -> float:
    """What sharing could save at most."""
    sizes = (width, inner, prompt, chain)
    return multiplications(*sizes, shared=False) / multiplications(*sizes, shared=True)


class Problem:
    """A random model and group."""

    def __init__(self, scale: int) -> None:
        torch.manual_seed(0)
        family = Family.from_pretrained("toy/weights/policy")
        self.sizes = (WIDTH // scale, INNER // scale, PROMPT // scale, CHAIN // scale)
        width, inner, prompt, chain = self.sizes
        config = VlcotConfig(
            vocab_size=family.vocabulary.size,
            hidden_size=width,
            intermediate_size=inner,
            num_hidden_layers=2,
            num_attention_heads=HEADS // scale,
            num_key_value_heads=HEADS // scale,
            max_position_embeddings=prompt + chain,
        )
        self.model = VlcotForCausalLM(config)
        self.table = SupportTable.of(family.grammar)
        codes = torch.from_numpy(family.grammar.support_ids(Support.CODE))
        self.prompt = codes[torch.randint(len(codes), (1, prompt))]
        self.chains = codes[torch.randint(len(codes), (GROUP, chain))]
        self.supports = torch.full_like(self.chains, int(Support.CODE), dtype=torch.uint8)
        self.upstream = torch.randn(GROUP, chain) / chain

    def shared(self) -> torch.Tensor:
        """The learner's way."""
        return self.model.chain_logprobs(self.prompt, self.chains, self.supports, (GROUP,), self.table)

    def repeated(self) -> torch.Tensor:
        """Whole sequences."""
        ids = torch.cat([self.prompt.expand(GROUP, -1), self.chains], 1)
        supports = torch.zeros_like(ids, dtype=torch.uint8)
        supports[:, self.prompt.shape[1] :] = self.supports
        return self.model.token_logprobs(ids, self.table, supports)[:, self.prompt.shape[1] :]

    def step(self, side: Callable[[], torch.Tensor]) -> tuple[float, torch.Tensor]:
        """Seconds of forward and backward, and all gradients in one row."""
        self.model.zero_grad()
        started = time.perf_counter()
        (side() * self.upstream).sum().backward()
        seconds = time.perf_counter() - started
        return seconds, torch.cat([p.grad.flatten() for p in self.model.parameters() if p.grad is not None])


def run(scale: int, rounds: int) -> dict[str, Any]:
    """All figures."""
    problem = Problem(scale)
    pairs, differences = [], []
    for _ in range(rounds):
        repeated_s, repeated = problem.step(problem.repeated)
        shared_s, shared = problem.step(problem.shared)
        pairs.append((repeated_s, shared_s))
        differences.append(float((shared - repeated).norm() / repeated.norm()))
    width, inner, prompt, chain = problem.sizes
    return {
        "machine": machine(),
        "width": width,
        "prompt_tokens": prompt,
        "chain_tokens": chain,
        "group_size": GROUP,
        "repeated_s": round(statistics.median(a for a, _ in pairs), 2),
        "shared_s": round(statistics.median(b for _, b in pairs), 2),
        "ratio": round(statistics.median(a / b for a, b in pairs), 3),
        "limit": round(limit(width, inner, prompt, chain), 3),
        "limit_7b": round(limit(WIDTH, INNER, PROMPT, CHAIN), 3),
        "gradient_difference": max(differences),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--scale", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    output_option(parser, "shared_prompt")
    args = parser.parse_args()
    write(args.output, run(args.scale, args.rounds))


if __name__ == "__main__":
    main()
