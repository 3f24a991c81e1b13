"""What every rank of the learner group runs inside Ray Train."""

from __future__ import annotations

import logging
import time
from typing import Any

import ray
import ray.train
import torch
import torch.distributed as dist

from learners.checkpoints import checkpoint, export_policy, restore_checkpoint
from learners.engine import BasePolicy, Reference, ShardedPolicy, engine_versions, join_process_group
from learners.grpo_step import grpo_step
from learners.protocols import LearnerStart, LoopConfig
from learners.publisher import Publisher
from learners.spec import LearnerSpec

LOG = logging.getLogger(__name__)


def train_loop(config: dict[str, Any]) -> int:
    """Train until ``steps`` are done or the source ends; ``config["loop"]`` is a
    :class:`~learners.protocols.LoopConfig`.

    Per step: batch, GRPO step, weight push, report, and a checkpoint when one is due or a node is about to be
    taken away. At the end the policy is exported.

    Returns:
        Steps done.
    """
    loop: LoopConfig = config["loop"]
    spec = loop.spec
    device = join_process_group(spec)
    leader = dist.get_rank() == 0
    policy = ShardedPolicy(spec.policy_path, spec, device, trainable=True)
    reference = _reference(policy, spec, device)
    publisher = Publisher(policy.weights(), spec.bucket_bytes)
    done = saved = restore_checkpoint(policy)
    if done:
        publisher.push(done, loop.sink)  # actors may serve older weights, or those of steps that are lost
    checksums = publisher.checksums()
    if leader:
        loop.progress.started(LearnerStart(done, checksums, engine_versions()))

    metrics: dict[str, float] = {}
    while done < spec.steps:
        started = time.perf_counter()
        groups = loop.source.next_batch(done + 1)
        if groups is None:
            break
        waited = time.perf_counter() - started
        metrics = grpo_step(policy, reference, groups, done + 1, spec, device)
        metrics |= publisher.push(done + 1, loop.sink)
        metrics |= {"time/wait_batch": waited, "time/learner_step": time.perf_counter() - started}
        done += 1
        LOG.info("trained and pushed in %.2f s", metrics["time/learner_step"], extra={"step": done})
        if leader:
            loop.progress.report(done, metrics)
        if done % spec.checkpoint_every == 0 or ray.train.get_preemption_info() is not None:
            saved = checkpoint(policy, done, metrics, loop.progress)
    if saved != done:
        checkpoint(policy, done, metrics, loop.progress)
    export_policy(policy, spec, loop.export_path, loop.export_files)
    return done


def _reference(policy: ShardedPolicy, spec: LearnerSpec, device: torch.device) -> Reference | None:
    if spec.reference_path is None:
        return None
    if spec.lora is not None:
        return BasePolicy(policy)
    return ShardedPolicy(spec.reference_path, spec, device, trainable=False)
