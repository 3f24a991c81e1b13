"""Log-probs over the allowed ids against the full vocabulary: `python -m benchmarks.logprob_head`.

Forward and backward of the head alone: hidden size 1,024, the 7B's 73,728 ids, one true VLCoT chain of the 512 px
layout. The plain side is the cheapest that a learner without a grammar can do: one softmax over all ids at every
position of the chain. For the comparison of gradients it masks the ids that the grammar forbids, which is not timed.
Both sides are timed in turn in one process; peak memory is measured in a process of its own per side.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from benchmarks.figures import machine, output_option, write
from vlcot.grammar import Support
from vlcot.policy.logprobs import SupportTable, support_logprobs
from vlcot.sequence import Layout, SequenceBuilder
from vlcot.vocabulary import Vocabulary, code_name

CODES = 16_384
SIZE = 73_728
Head = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class Problem:
    """Random hidden states and head, ids and supports of one chain of the 512 px layout."""

    def __init__(self, hidden: int, seed: int = 0) -> None:
        table = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "<eoss>": 8196, "<racm3:break>": 8197}
        table |= {f"<reserved{n:05d}>": n + 4 for n in range(8194, 8865)}
        table |= {code_name(c): c + 4 if c < 8192 else c + 57344 for c in range(CODES)}
        table |= {f"word{i}": i for i in range(8869, 65536)}
        vocabulary = Vocabulary.from_token_table(table, size=SIZE)
        rng = np.random.default_rng(seed)
        # A word per four characters, as a byte-pair tokenizer would have it; which words does not matter here.
        builder = SequenceBuilder(
            vocabulary,
            Layout(),
            lambda text: rng.choice(vocabulary.text_ids, max(1, len(text) // 4)).tolist(),
            lambda ids: "",
        )
        texts = ["x" * n for n in (160, 240, 400, 700)]
        codes = [rng.integers(0, CODES, shape) for shape in builder.grammar.grids]
        chain = builder.chain(texts, codes)
        self.table = SupportTable.of(builder.grammar)
        self.supports = torch.from_numpy(builder.grammar.supports(chain.tolist()))
        self.ids = torch.from_numpy(chain.astype(np.int64))
        generator = torch.Generator().manual_seed(seed)
        self.hidden = torch.randn(len(chain), hidden, generator=generator)
        self.weight = torch.randn(SIZE, hidden, generator=generator) / hidden**0.5

    def allowed(self, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """The project's head."""
        return support_logprobs(hidden, weight, self.table, self.ids, self.supports, 1.0)

    def full(self, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Softmax over all ids at every position."""
        logits = hidden @ weight.T
        return logits.gather(1, self.ids[:, None]).squeeze(1) - logits.logsumexp(1)

    def masked(self, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """The same with forbidden ids masked: the distribution of `allowed`."""
        logits = hidden @ weight.T
        for kind, index in self.table.index.items():
            forbidden = index < 0
            logits = logits.masked_fill((self.supports == int(kind))[:, None] & forbidden, float("-inf"))
        logprobs = logits.gather(1, self.ids[:, None]).squeeze(1) - logits.logsumexp(1)
        return torch.where(self.supports == int(Support.FORCED), 0.0, logprobs)


def gradients(problem: Problem, head: Head) -> list[torch.Tensor]:
    """Gradients of the sum of log-probs, for the hidden states and the weight."""
    hidden, weight = (x.clone().requires_grad_() for x in (problem.hidden, problem.weight))
    head(hidden, weight).sum().backward()
    return [hidden.grad, weight.grad]


def seconds(problem: Problem, head: Head) -> float:
    """One forward and backward."""
    started = time.perf_counter()
    gradients(problem, head)
    return time.perf_counter() - started


def peak_bytes(hidden: int, side: str) -> int:
    """Rise of the process's memory in a forward and backward, less the two gradients, which both sides need."""
    problem = Problem(hidden)
    copies = 2 * (problem.hidden.nbytes + problem.weight.nbytes)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = _memory("VmRSS")
    gradients(problem, getattr(problem, side))
    return _memory("VmHWM") - before - copies


def _memory(field: str) -> int:
    """Bytes, from /proc/self/status (getrusage would also count the peak of the process that started this one)."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def run(hidden: int, rounds: int) -> dict[str, float | int | str]:
    """All figures."""
    problem = Problem(hidden)
    differences = [
        float((a - b).norm() / b.norm())
        for a, b in zip(gradients(problem, problem.allowed), gradients(problem, problem.masked), strict=True)
    ]
    pairs = [(seconds(problem, problem.full), seconds(problem, problem.allowed)) for _ in range(rounds)]
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        full, allowed = (pool.apply(peak_bytes, (hidden, side)) for side in ("full", "allowed"))
    return {
        "machine": machine(),
        "hidden": hidden,
        "vocabulary": SIZE,
        "chain_tokens": len(problem.ids),
        "sampled_tokens": int((problem.supports != int(Support.FORCED)).sum()),
        "full_s": round(statistics.median(full for full, _ in pairs), 3),
        "allowed_s": round(statistics.median(allowed for _, allowed in pairs), 3),
        "time_ratio": round(statistics.median(full / allowed for full, allowed in pairs), 2),
        "full_peak_mib": full >> 20,
        "allowed_peak_mib": allowed >> 20,
        "memory_ratio": round(full / allowed, 1),
        "gradient_difference": max(differences),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3)
    output_option(parser, "logprob_head")
    args = parser.parse_args()
    write(args.output, run(args.hidden, args.rounds))


if __name__ == "__main__":
    main()
