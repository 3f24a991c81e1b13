"""What DeepSpeed holds for a policy on one rank, counted tensor by tensor.

    python -m tests.rl_system.doctor.zero3_states POLICY DTYPE

Prints JSON: bytes of ``weights``, ``gradients`` and ``optimizer``; a tensor that serves as two counts as the first.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Iterable
from datetime import timedelta

import torch
import torch.distributed as dist

from learners.batching import idle_micro_batch
from learners.engine import ShardedPolicy, join_process_group
from learners.spec import LearnerSpec
from vlcot.grpo import LossConfig


def count(policy: ShardedPolicy) -> dict[str, int]:
    """After a step, so that the optimizer has made its moments."""
    zero = policy._engine.optimizer
    moments = [t for state in zero.optimizer.state.values() for t in state.values() if t.numel() > 1]
    seen: set[int] = set()

    def of(tensors: Iterable[torch.Tensor]) -> int:
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        fresh = {pointer: size for pointer, size in storages.items() if pointer not in seen}
        seen.update(fresh)
        return sum(fresh.values())

    return {
        "weights": of(zero.fp16_partitioned_groups_flat),
        "gradients": of([zero.grad_partitions_flat_buffer]),
        "optimizer": of([*zero.fp32_partitioned_groups_flat, *moments]),
    }


def main(path: str, dtype: str) -> None:
    """One rank, one step."""
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    meeting = f"file://{tempfile.mkdtemp()}/meeting"
    dist.init_process_group("gloo", meeting, timedelta(seconds=60), 1, 0)
    spec = LearnerSpec(path, None, 1, 1, 1.0, 0, ranks=1, dtype=dtype, loss=LossConfig(kl_beta=0.0))  # type: ignore[arg-type]
    policy = ShardedPolicy(path, spec, join_process_group(spec), trainable=True)
    policy.backward(policy.logprobs(idle_micro_batch(int(policy.family.vocabulary.text_ids[0]))).sum())
    policy.step(1e-6)
    print(json.dumps(count(policy)))
    sys.stdout.flush()
    os._exit(0)  # threads of gloo may abort the end of the interpreter (tests.learners.zero3_gradient)


if __name__ == "__main__":
    main(*sys.argv[1:])
