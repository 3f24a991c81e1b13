"""What every rank of a cold start runs inside Ray Train."""

from __future__ import annotations

from typing import Any

import ray.train
import torch.distributed as dist

from learners.checkpoints import checkpoint, export_policy, restore_checkpoint
from learners.engine import ShardedPolicy, engine_versions, join_process_group
from learners.protocols import LearnerStart, SupervisedConfig
from learners.supervised_step import Batch, held_out_loss, supervised_step


def supervised_loop(config: dict[str, Any]) -> int:
    """Train until ``steps`` are done or the line says stop; ``config["loop"]`` is a
    :class:`~learners.protocols.SupervisedConfig`.

    Per step: examples, update, now and then the held-out loss, report, and a checkpoint when one is due or a node is
    about to be taken away. At the end the policy is exported.

    Returns:
        Steps done.
    """
    loop: SupervisedConfig = config["loop"]
    spec = loop.spec
    device = join_process_group(spec)
    leader = dist.get_rank() == 0
    policy = ShardedPolicy(spec.policy_path, spec, device, trainable=True, dropout=loop.dropout)
    grammar = policy.family.grammar
    held_out = Batch.of(loop.source.held_out(), grammar)
    done = saved = restore_checkpoint(policy)
    if leader:
        loop.line.started(LearnerStart(done, {}, engine_versions()))

    metrics: dict[str, float] = {}
    while done < spec.steps and loop.line.goes_on(done + 1):
        batch = Batch.of(loop.source.examples(done + 1), grammar)
        metrics = supervised_step(policy, batch, done + 1, spec, loop.z_loss, device)
        done += 1
        if done % loop.evaluate_every == 0 or done == spec.steps:
            found = held_out_loss(policy, held_out, spec, loop.z_loss, device)
            metrics |= {f"heldout/{name}": value for name, value in found.items()}
        if leader:
            loop.line.report(done, metrics)
        if done % spec.checkpoint_every == 0 or ray.train.get_preemption_info() is not None:
            saved = checkpoint(policy, done, metrics, loop.line)
    if saved != done:
        checkpoint(policy, done, metrics, loop.line)
    export_policy(policy, spec, loop.export_path, loop.export_files)
    return done
