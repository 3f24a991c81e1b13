"""One GRPO step under ZeRO-3 in processes of its own: gradient, weights and metrics of each job, saved by rank 0.

    python -m tests.learners.zero3_gradient JOBS.pkl RANK RANKS

JOBS.pkl holds a list of :class:`Job`. Ranks meet through a file beside it.
"""

from __future__ import annotations

import os
import pickle
import sys
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from learners.engine import ShardedPolicy, gathered, join_process_group
from learners.grpo_step import grpo_step
from learners.spec import LearnerSpec
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


def main(jobs_path: str, rank: str, ranks: str) -> None:
    """Run all jobs in one process group."""
    os.environ |= {"RANK": rank, "WORLD_SIZE": ranks, "LOCAL_RANK": rank}
    jobs = pickle.loads(Path(jobs_path).read_bytes())
    meeting = f"file://{jobs_path}.meeting"
    dist.init_process_group("gloo", meeting, timedelta(seconds=300), int(ranks), int(rank))
    join_process_group(jobs[0].spec)
    for job in jobs:
        run(job)
    dist.destroy_process_group()
    sys.stderr.flush()
    # Threads of gloo and autograd that ask for the interpreter while it ends abort the process, seldom but with all the
    # work done (pytorch/pytorch#38228).
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
