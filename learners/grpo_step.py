"""One GRPO step on the groups of a batch."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
import torch.distributed as dist

from learners.batching import (
    MicroBatch,
    StepBatch,
    build_batch,
    collate,
    idle_micro_batch,
    plan_micro_batches,
)
from learners.engine import Reference, ShardedPolicy, seed_step
from learners.spec import LearnerSpec
from vlcot.groups import ScoredGroup
from vlcot.grpo import LossOutput, LossStats, finalise, grpo_loss


def grpo_step(
    policy: ShardedPolicy,
    reference: Reference | None,
    groups: Sequence[ScoredGroup],
    step: int,
    spec: LearnerSpec,
    device: torch.device,
) -> dict[str, float]:
    """Train ``policy`` on ``groups``; weights of version ``step - 1`` become version ``step``. Collective.

    The ratio is anchored on the sampler's log-probs, so stale samples are clipped; with truncated importance
    sampling, on the learner's own at the start of the step, and the sampler's enter the weights. A step in which
    every group was dropped changes nothing and says so in ``failures/steps_skipped``.

    Returns:
        Metrics, the same on every rank: ``grpo/*`` (means over loss tokens and epochs; ``grpo/entropy`` is the
        mean of -log-prob of the sampled choices, an estimator; ``grpo/grad_norm`` before clipping),
        ``mismatch/{mean,max}`` (|learner - sampler log-prob| on samples wholly of the current version, before
        the update), ``staleness/*``, ``failures/*``, ``batch/*``, ``time/{reference,train}`` in seconds and
        ``throughput/tokens_per_s`` (sampled tokens trained on).

    Raises:
        ValueError: see :func:`learners.batching.build_batch`.
        FloatingPointError: a gradient that is not finite.
    """
    started = time.perf_counter()
    batch = build_batch(groups, step - 1, spec)
    metrics = {**batch.metrics, "failures/steps_skipped": float(batch.denominators.tokens == 0)}
    if batch.denominators.tokens == 0:
        return metrics
    seed_step(spec, step)
    micros = [m.to(device) for m in _micro_batches(batch, policy, spec)]
    references = _frozen_logprobs(reference, micros)
    metrics["time/reference"] = time.perf_counter() - started
    anchors = _frozen_logprobs(policy, micros) if spec.loss.is_truncation is not None else [None] * len(micros)

    observed = _Observed.zeros(device)
    norms = []
    for epoch in range(spec.epochs_per_batch):
        for micro, reference_logprobs, anchor in zip(micros, references, anchors, strict=True):
            logprobs = policy.logprobs(micro)
            output = _loss(logprobs, micro, reference_logprobs, anchor, batch, spec)
            policy.backward(output.loss)
            observed.add(output.stats, logprobs.detach(), micro, first_epoch=epoch == 0)
        norms.append(policy.step(spec.learning_rate_at(step)))
    metrics |= observed.metrics(spec.epochs_per_batch)
    metrics["grpo/grad_norm"] = sum(norms) / len(norms)
    metrics["grpo/learning_rate"] = spec.learning_rate_at(step)
    metrics["time/train"] = time.perf_counter() - started
    tokens = sum(len(s.sample.ids) for s in batch.sequences)
    metrics["throughput/tokens_per_s"] = tokens / metrics["time/train"]
    return metrics


def _micro_batches(batch: StepBatch, policy: ShardedPolicy, spec: LearnerSpec) -> list[MicroBatch]:
    """This rank's share."""
    vocabulary = policy.family.vocabulary
    plan = plan_micro_batches(batch.sequences, dist.get_world_size(), spec.micro_batch_tokens)[dist.get_rank()]
    idle = idle_micro_batch(int(vocabulary.text_ids[0]))
    shares = [[[batch.sequences[row] for row in share.rows] for share in micro] for micro in plan]
    return [collate(micro, vocabulary.pad) if micro else idle for micro in shares]


@torch.no_grad()
def _frozen_logprobs(policy: Reference | None, micros: list[MicroBatch]) -> list[torch.Tensor | None]:
    if policy is None:
        return [None] * len(micros)
    return [policy.logprobs(micro) for micro in micros]


def _loss(
    logprobs: torch.Tensor,
    micro: MicroBatch,
    reference: torch.Tensor | None,
    anchor: torch.Tensor | None,
    batch: StepBatch,
    spec: LearnerSpec,
) -> LossOutput:
    behaviour = micro.behaviour.flatten()
    return grpo_loss(
        logprobs.flatten(),
        old_logprobs=behaviour if anchor is None else anchor.flatten(),
        behaviour_logprobs=behaviour,
        reference_logprobs=None if reference is None else reference.flatten(),
        advantages=micro.advantages,
        keep=micro.keep,
        token_mask=micro.token_mask.flatten(),
        sequence_index=micro.sequence_index,
        config=spec.loss,
        denominators=batch.denominators,
    )


class _Observed:
    """What a step has seen on this rank, merged over ranks at the end."""

    def __init__(self, stats: LossStats) -> None:
        self._stats = stats
        device = stats.sums.device
        self._sums = torch.zeros(4, dtype=torch.float64, device=device)  # -log-prob, tokens, mismatch, fresh tokens
        self._largest = torch.zeros(1, dtype=torch.float64, device=device)

    @classmethod
    def zeros(cls, device: torch.device) -> _Observed:
        return cls(LossStats.zeros(device))

    def add(self, stats: LossStats, logprobs: torch.Tensor, micro: MicroBatch, *, first_epoch: bool) -> None:
        self._stats = self._stats + stats
        if not first_epoch:
            return
        counted = micro.token_mask & micro.keep[:, None]
        difference = (logprobs - micro.behaviour).abs()[micro.fresh].double()
        parts = -logprobs[counted].double().sum(), counted.sum(), difference.sum(), micro.fresh.sum()
        self._sums += torch.stack([part.double() for part in parts])
        if difference.numel():
            self._largest = torch.maximum(self._largest, difference.max())

    def metrics(self, epochs: int) -> dict[str, float]:
        sums = torch.cat([self._stats.sums, self._sums])
        maxima = torch.cat([self._stats.maxima, self._largest])
        dist.all_reduce(sums, op=dist.ReduceOp.SUM)
        dist.all_reduce(maxima, op=dist.ReduceOp.MAX)
        metrics = finalise(LossStats(sums[:-4], maxima[:-1]))
        metrics["grpo/loss"] /= epochs
        negative, tokens, mismatch, fresh = sums[-4:].tolist()
        metrics["grpo/entropy"] = negative / tokens
        if fresh:
            metrics |= {"mismatch/mean": mismatch / fresh, "mismatch/max": float(maxima[-1])}
        return metrics
