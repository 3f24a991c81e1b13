"""One GRPO step under ZeRO-3 in processes of its own: gradient, weights and metrics of each job, saved by rank 0.

    python -m tests.learners.zero3_gradient JOBS.pkl RANK RANKS

JOBS.pkl holds a list of :class:`Job`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from learners.engine import ShardedPolicy, gathered
from learners.grpo_step import grpo_step
from learners.spec import LearnerSpec
from tests.learners.ranks import work
from vlcot.groups import ScoredGroup


@dataclass(frozen=True)
class Job:
    """``groups`` are step 1 of ``spec``; the result goes to ``output``."""

    spec: LearnerSpec
    groups: list[ScoredGroup]
    output: Path


class RecordingPolicy(ShardedPolicy):
    """Keeps the accumulated gradient of each update."""

    def step(self, learning_rate: float) -> float:
        from deepspeed.utils import safe_get_full_grad

        self.gradient = {name: safe_get_full_grad(p).clone() for name, p in self.parameters().items()}
        return super().step(learning_rate)


def run(job: Job) -> None:
    """Train one step from the start weights."""
    device = torch.device("cpu")
    policy = RecordingPolicy(job.spec.policy_path, job.spec, device, trainable=True)
    reference = ShardedPolicy(job.spec.reference_path, job.spec, device, trainable=False)
    metrics = grpo_step(policy, reference, job.groups, 1, job.spec, device)
    parameters = policy.parameters()
    with gathered(list(parameters.values())):
        weights = {name: p.detach().clone() for name, p in parameters.items()}
    if dist.get_rank() == 0:
        torch.save({"gradient": policy.gradient, "weights": weights, "metrics": metrics}, job.output)


if __name__ == "__main__":
    work(run)
