"""One supervised step: next-token loss on the answers of a batch of examples.

Minimised is the mean over the answers' choices of -log p + z (log-sum-exp)^2. p and the log-sum-exp are over the ids
that the grammar allows, as in sampling and in GRPO; forced ids have no loss. The second term is Lumina-mGPT's z-loss.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from learners.batching import MicroBatch, TrainingSequence, collate, idle_micro_batch, plan_micro_batches
from learners.engine import ShardedPolicy, seed_step
from learners.protocols import Example
from learners.spec import LearnerSpec
from vlcot.grammar import CHOICES, Grammar, Support
from vlcot.groups import Sample
from vlcot.sequence import ParsedChain

_NO_CHAIN = ParsedChain(None, None, None, None, (), ())


@dataclass(frozen=True, eq=False)
class Batch:
    """Examples of one step, ready for any split over ranks and micro-batches."""

    sequences: tuple[TrainingSequence, ...]

    @classmethod
    def of(cls, examples: Sequence[Example], grammar: Grammar) -> Batch:
        """Supports from the grammar.

        Raises:
            ValueError: an answer that is no chain of the grammar.
        """
        return cls(tuple(_sequence(example, row, grammar) for row, example in enumerate(examples)))

    @property
    def tokens(self) -> int:
        """Ids with loss."""
        return sum(int(np.count_nonzero(s.sample.supports)) for s in self.sequences)


def supervised_step(
    policy: ShardedPolicy, batch: Batch, step: int, spec: LearnerSpec, z_loss: float, device: torch.device
) -> dict[str, float]:
    """Train ``policy`` on ``batch`` as step ``step`` (1, 2, ...). Collective.

    Returns:
        Metrics, the same on every rank: ``loss/{total,z}``, ``loss/{text,code,...}`` (mean -log-prob in nats by
        support), ``learner/{grad_norm,learning_rate}``, ``time/train`` in seconds, ``throughput/tokens_per_s``.

    Raises:
        FloatingPointError: a gradient that is not finite.
    """
    started = time.perf_counter()
    seed_step(spec, step)
    policy.train()
    sums = _Sums(device)
    for micro in _micro_batches(batch, policy, spec):
        micro = micro.to(device)
        logprobs, logsumexp = policy.scores(micro)
        counted = micro.token_mask & micro.keep[:, None]
        loss = (z_loss * logsumexp.square() - logprobs)[counted].sum() / batch.tokens
        policy.backward(loss)
        sums.add(logprobs.detach(), logsumexp.detach(), micro, counted)
    learning_rate = spec.learning_rate_at(step)
    norm = policy.step(learning_rate)
    took = time.perf_counter() - started
    return sums.metrics(z_loss) | {
        "learner/grad_norm": norm,
        "learner/learning_rate": learning_rate,
        "time/train": took,
        "throughput/tokens_per_s": batch.tokens / took,
    }


@torch.no_grad()
def held_out_loss(
    policy: ShardedPolicy, batch: Batch, spec: LearnerSpec, z_loss: float, device: torch.device
) -> dict[str, float]:
    """``loss/*`` of :func:`supervised_step` on examples that are not trained on, without dropout. Collective."""
    policy.train(False)
    sums = _Sums(device)
    for micro in _micro_batches(batch, policy, spec):
        micro = micro.to(device)
        logprobs, logsumexp = policy.scores(micro)
        sums.add(logprobs, logsumexp, micro, micro.token_mask & micro.keep[:, None])
    return sums.metrics(z_loss)


class _Sums:
    """Negative log-probs and ids by support, and squared log-sum-exps, of this rank."""

    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(len(CHOICES) + 1, 2, dtype=torch.float64, device=device)

    def add(self, logprobs: torch.Tensor, logsumexp: torch.Tensor, micro: MicroBatch, counted: torch.Tensor) -> None:
        for row, support in enumerate(CHOICES):
            here = counted & (micro.supports == int(support))
            self._sums[row] += torch.stack([-logprobs[here].double().sum(), here.sum().double()])
        self._sums[-1] += torch.stack([logsumexp[counted].double().square().sum(), counted.sum().double()])

    def metrics(self, z_loss: float) -> dict[str, float]:
        dist.all_reduce(self._sums)
        *kinds, (squares, tokens) = self._sums.tolist()
        found = {f"loss/{Support(s).name.lower()}": a / n for s, (a, n) in zip(CHOICES, kinds, strict=True) if n}
        z = z_loss * squares / tokens
        return {"loss/total": sum(negative for negative, _ in kinds) / tokens + z, "loss/z": z, **found}


def _micro_batches(batch: Batch, policy: ShardedPolicy, spec: LearnerSpec) -> list[MicroBatch]:
    """This rank's share."""
    vocabulary = policy.family.vocabulary
    plan = plan_micro_batches(batch.sequences, dist.get_world_size(), spec.micro_batch_tokens)[dist.get_rank()]
    idle = idle_micro_batch(int(vocabulary.text_ids[0]))
    shares = [[[batch.sequences[row] for row in share.rows] for share in micro] for micro in plan]
    return [collate(micro, vocabulary.pad) if micro else idle for micro in shares]


def _sequence(example: Example, row: int, grammar: Grammar) -> TrainingSequence:
    supports = grammar.supports(example.answer.tolist())
    sample = Sample(
        ids=example.answer,
        logprobs=np.zeros(len(example.answer), np.float32),
        supports=supports,
        versions=(),
        finish_reason="stop",
        chain=_NO_CHAIN,
        images=(),
    )
    return TrainingSequence(example.prompt, sample, advantage=0.0, group=row, fresh=False)
