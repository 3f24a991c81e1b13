"""GRPO steps on LoRA adapters under ZeRO-3 in processes of their own (:mod:`tests.learners.ranks`)."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from learners.adapters import Weight
from learners.checkpoints import export_policy
from learners.engine import BasePolicy, ShardedPolicy, gathered
from learners.grpo_step import grpo_step
from learners.publisher import Publisher
from learners.spec import LearnerSpec
from tests.learners.ranks import work
from vlcot.groups import ScoredGroup
from vlcot.weights import Bucket, PushReport, checksums, unpack

DEVICE = torch.device("cpu")


@dataclass(frozen=True)
class LoraJob:
    """Two steps on ``groups``, whose samples are of version 0; with ``stop`` another policy loads the first's state.

    The result goes to ``output``, the policy beside it with ``export``.
    """

    spec: LearnerSpec
    groups: list[ScoredGroup]
    output: Path
    stop: bool = False
    export: bool = False


@dataclass
class Receiver:
    """A :class:`vlcot.weights.WeightSink` that keeps what comes."""

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    layout: tuple[Bucket, ...] = ()

    def begin(self, version: int, layout: Sequence[Bucket]) -> None:
        self.layout = tuple(layout)

    def send(self, index: int, data: np.ndarray) -> None:
        self.tensors |= dict(unpack(self.layout[index], data.copy()))

    def finish(self, sums: Mapping[str, int]) -> PushReport:
        assert checksums(self.tensors.items()) == dict(sums)
        return PushReport(1, {}, 0, 1)


class RecordingPolicy(ShardedPolicy):
    """Keeps the accumulated gradient of each update."""

    def step(self, learning_rate: float) -> float:
        from deepspeed.utils import safe_get_full_grad

        trained = {name: p for name, p in self.parameters().items() if p.requires_grad}
        self.gradient = {name: safe_get_full_grad(p).clone() for name, p in trained.items()}
        return super().step(learning_rate)


def whole(weights: Mapping[str, Weight]) -> dict[str, torch.Tensor]:
    """Copies of all."""
    with gathered([p for weight in weights.values() for p in weight.parameters]):
        return {name: weight.value().clone() for name, weight in weights.items()}


def pushed(policy: ShardedPolicy, spec: LearnerSpec) -> dict[str, torch.Tensor]:
    """What a receiver of a push has then; empty beside rank 0."""
    receiver = Receiver()
    Publisher(policy.weights(), spec.bucket_bytes).push(1, receiver)
    return receiver.tensors


def run(job: LoraJob) -> None:
    """Train."""
    policy = fresh(job.spec)
    found: dict[str, Any] = {"start": pushed(policy, job.spec), "first": whole(policy.adapters()), "metrics": []}
    for step in (1, 2):
        found["adapters"] = whole(policy.adapters())
        found["metrics"].append(grpo_step(policy, BasePolicy(policy), job.groups, step, job.spec, DEVICE))
        if job.stop and step == 1:
            policy = reloaded(policy, job)
    found |= {"gradient": policy.gradient, "trained": whole(policy.adapters()), "pushed": pushed(policy, job.spec)}
    base = {
        name.replace(".base_layer", ""): Weight((p,)) for name, p in policy.parameters().items() if "lora" not in name
    }
    found["base"] = whole(base)
    found["optimizer"] = sum(t.numel() for t in policy._engine.optimizer.fp32_partitioned_groups_flat)
    if job.export:
        export_policy(policy, job.spec, job.output.parent / "exported")
    if dist.get_rank() == 0:
        torch.save(found, job.output)


def fresh(spec: LearnerSpec) -> RecordingPolicy:
    """A policy at its start."""
    return RecordingPolicy(spec.policy_path, spec, DEVICE, trainable=True)


def reloaded(policy: ShardedPolicy, job: LoraJob) -> RecordingPolicy:
    """Another policy, of another seed, with the state of ``policy``."""
    folder = [tempfile.mkdtemp(dir=job.output.parent)]
    dist.broadcast_object_list(folder)
    policy.save(folder[0], {})
    dist.barrier()
    other = fresh(job.spec)
    other.load(folder[0])
    return other


if __name__ == "__main__":
    work(run)
