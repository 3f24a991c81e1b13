"""Supervised steps under ZeRO-3 in processes of their own (:mod:`tests.learners.ranks`)."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from learners.engine import ShardedPolicy, gathered
from learners.protocols import Example
from learners.spec import LearnerSpec
from learners.supervised_step import Batch, held_out_loss, supervised_step
from tests.learners.ranks import work
from tests.learners.zero3_gradient import RecordingPolicy

Z_LOSS = 0.02


@dataclass(frozen=True)
class SupervisedJob:
    """Steps 1 to ``steps`` on one batch each; with ``stop_at`` the policy is saved there and loaded by another.

    The result goes to ``output``: metrics of each step and of the held-out batch, the last gradient, the weights.
    """

    spec: LearnerSpec
    batches: list[list[Example]]
    held_out: list[Example]
    dropout: float
    output: Path
    stop_at: int | None = None


def fresh(job: SupervisedJob) -> RecordingPolicy:
    """A policy at its start."""
    device = torch.device("cpu")
    return RecordingPolicy(job.spec.policy_path, job.spec, device, trainable=True, dropout=job.dropout)


def run(job: SupervisedJob) -> None:
    """Train."""
    device, policy, seen = torch.device("cpu"), fresh(job), []
    grammar = policy.family.grammar
    for step, examples in enumerate(job.batches, 1):
        seen.append(supervised_step(policy, Batch.of(examples, grammar), step, job.spec, Z_LOSS, device))
        if step == job.stop_at:
            policy = reloaded(policy, job)
    held_out = held_out_loss(policy, Batch.of(job.held_out, grammar), job.spec, Z_LOSS, device)
    parameters = policy.parameters()
    with gathered(list(parameters.values())):
        weights = {name: p.detach().clone() for name, p in parameters.items()}
    if dist.get_rank() == 0:
        found = {"metrics": seen, "held_out": held_out, "gradient": policy.gradient, "weights": weights}
        torch.save(found, job.output)


def reloaded(policy: ShardedPolicy, job: SupervisedJob) -> RecordingPolicy:
    """Another policy with the state of ``policy``."""
    folder = [tempfile.mkdtemp(dir=job.output.parent)]
    dist.broadcast_object_list(folder)
    policy.save(folder[0], {})
    dist.barrier()
    other = fresh(job)
    other.load(folder[0])
    return other


if __name__ == "__main__":
    work(run)
