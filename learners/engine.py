"""The policy and the frozen reference as DeepSpeed ZeRO-3 engines.

Losses come in already divided by the step's totals, so gradients must be summed over micro-batches and ranks.
DeepSpeed averages over ranks (undone in :meth:`ShardedPolicy.backward`) and, with caller-owned accumulation,
divides by nothing else.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from learners.adapters import Weight, add_adapters, base_only, factors_of, weights_of
from learners.batching import MicroBatch
from learners.spec import LearnerSpec
from vlcot.policy.family import Family
from vlcot.policy.logprobs import SupportTable
from vlcot.policy.model import VlcotForCausalLM

ADAM_EPS = 1e-8
_PREFIX = "policy."
_TAG = "zero3"


class ScoreModule(nn.Module):
    """A policy whose forward gives scores of chains, so that the engine's hooks gather its shards."""

    def __init__(self, policy: VlcotForCausalLM, table: SupportTable, temperature: float) -> None:
        super().__init__()
        self.policy = policy
        self.table = table
        self.temperature = temperature

    def forward(
        self, prompt_ids: torch.Tensor, chain_ids: torch.Tensor, supports: torch.Tensor, counts: tuple[int, ...]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Two float32 [B, S]; see :meth:`VlcotForCausalLM.chain_scores`."""
        return self.policy.chain_scores(prompt_ids, chain_ids, supports, counts, self.table, self.temperature)


def join_process_group(spec: LearnerSpec) -> torch.device:
    """Prepare this worker: threads, seed, DeepSpeed on the process group that Ray Train made.

    Returns:
        The device of this rank.
    """
    torch.set_num_threads(spec.threads)
    torch.manual_seed(spec.seed)
    import deepspeed

    # The shared-memory op serves inference only; without this, it is compiled with g++ at the first start.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="nccl" if spec.use_gpu else "gloo")
    if not spec.use_gpu:
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    return device


def engine_versions() -> dict[str, str]:
    """Versions of the engines as imported in this process."""
    import deepspeed
    import ray

    return {"deepspeed": deepspeed.__version__, "torch": torch.__version__, "ray": ray.__version__}


class ShardedPolicy:
    """A policy in ZeRO-3 shards over all ranks. Every method is collective.

    Args:
        path: policy directory.
        spec: of the learner group.
        device: of this rank.
        trainable: with AdamW and gradients; otherwise frozen and for inference only.
        dropout: of what attention and MLP add to the residual stream, in training (Lumina-mGPT).
    """

    def __init__(
        self, path: str, spec: LearnerSpec, device: torch.device, *, trainable: bool, dropout: float = 0.0
    ) -> None:
        import deepspeed
        from transformers.integrations import HfDeepSpeedConfig

        config = _deepspeed_config(spec, offload=spec.offload_reference and not trainable)
        # transformers shards at load while this object is alive.
        self._sharded_load = HfDeepSpeedConfig(config)
        policy = VlcotForCausalLM.from_pretrained(
            path, dtype=getattr(torch, spec.dtype), attn_implementation="sdpa", local_files_only=True
        )
        lora = spec.lora if trainable else None
        policy.requires_grad_(trainable)
        if lora is not None:
            add_adapters(policy, lora, spec.seed)
        if trainable and spec.activation_checkpointing:
            # The other kind compares shapes of kept and recomputed tensors, and ZeRO-3 frees parameters between them.
            policy.gradient_checkpointing_enable({"use_reentrant": True})
            if lora is not None:
                policy.enable_input_require_grads()  # reentrant: a layer whose input needs no gradient would have none
        if dropout:
            _drop_residuals(policy, dropout)
        self.family = Family.from_pretrained(path)
        module = ScoreModule(policy, SupportTable.of(self.family.grammar, device), spec.temperature)
        module.train(trainable)
        optimizer = _adamw(module, spec) if trainable else None
        self._engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config)
        self._ranks = torch.distributed.get_world_size()
        self._adapted = lora is not None

    def logprobs(self, micro: MicroBatch) -> torch.Tensor:
        """float32 [B, S] of the chains' ids under these weights and the sampling distribution."""
        return self.scores(micro)[0]

    def scores(self, micro: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """:meth:`logprobs`, and the log-sum-exp of the logits at each position: two float32 [B, S]."""
        return self._engine(micro.prompt_ids, micro.chain_ids, micro.supports, micro.counts)

    def train(self, mode: bool = True) -> None:
        """Dropout or not."""
        self._engine.module.train(mode)

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradient of this rank's share ``loss`` to that of the step."""
        self._engine.backward(loss * self._ranks)

    def step(self, learning_rate: float) -> float:
        """One AdamW update with the gradient gathered since the last one.

        Returns:
            Global gradient norm before clipping.

        Raises:
            FloatingPointError: the gradient is not finite; the weights are as they were.
        """
        for group in self._engine.optimizer.param_groups:  # other objects after load()
            group["lr"] = learning_rate
        self._engine.step()
        norm = float(self._engine.get_global_grad_norm())
        if not self._engine.was_step_applied():
            raise FloatingPointError(f"the gradient is not finite (norm {norm}): no update was made")
        return norm

    def parameters(self) -> dict[str, nn.Parameter]:
        """Parameters by their name in a checkpoint; whole only inside :func:`gathered`."""
        return {name.removeprefix(_PREFIX): p for name, p in self._engine.module.named_parameters()}

    def weights(self) -> dict[str, Weight]:
        """The tensors of the policy by their name in a checkpoint, adapters merged into them."""
        return {name.removeprefix(_PREFIX): weight for name, weight in weights_of(self._engine.module).items()}

    def adapters(self) -> dict[str, Weight]:
        """The adapters' own tensors by name; none without LoRA."""
        return {name.removeprefix(_PREFIX): factor for name, factor in factors_of(self._engine.module).items()}

    def save(self, directory: str, state: dict[str, Any]) -> None:
        """Write this rank's shards, and ``state`` beside them. Frozen weights are where they were loaded from."""
        self._engine.save_checkpoint(directory, tag=_TAG, client_state=state, exclude_frozen_parameters=self._adapted)

    def load(self, directory: str) -> dict[str, Any]:
        """Load what :meth:`save` wrote and return its state.

        Raises:
            RuntimeError: no checkpoint there, or one of another number of ranks.
        """
        path, state = self._engine.load_checkpoint(directory, tag=_TAG, load_module_strict=not self._adapted)
        if path is None:
            raise RuntimeError(f"no learner checkpoint of {self._ranks} ranks in {directory}")
        return state


class Reference(Protocol):
    """A frozen policy that the KL is to."""

    def logprobs(self, micro: MicroBatch) -> torch.Tensor:
        """As :meth:`ShardedPolicy.logprobs`."""


class BasePolicy:
    """The policy as it was before its adapters: the same shards."""

    def __init__(self, policy: ShardedPolicy) -> None:
        self._policy = policy

    def logprobs(self, micro: MicroBatch) -> torch.Tensor:
        """As :meth:`ShardedPolicy.logprobs`."""
        with base_only(self._policy._engine.module):
            return self._policy.logprobs(micro)


def seed_step(spec: LearnerSpec, step: int) -> None:
    """Dropout of a step is drawn from the seed, the step and the rank, so that a step repeated is the same step."""
    torch.manual_seed(int(np.random.default_rng([spec.seed, step, torch.distributed.get_rank()]).integers(2**63)))


@contextmanager
def gathered(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Inside, ``parameters`` hold their whole values on every rank; copies must be taken there."""
    if not any(hasattr(p, "ds_id") for p in parameters):
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(parameters)):
        yield


def _drop_residuals(policy: VlcotForCausalLM, share: float) -> None:
    def drop(module: nn.Module, _: Any, output: torch.Tensor) -> torch.Tensor:
        return nn.functional.dropout(output, share, module.training)

    for layer in policy.model.layers:
        for last in (layer.self_attn.o_proj, layer.mlp.down_proj):
            last.register_forward_hook(drop)


def _adamw(module: nn.Module, spec: LearnerSpec) -> torch.optim.AdamW:
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    plain = {name for name in trained if "norm" in name or name.endswith("bias")}
    groups = [
        {"params": [p for name, p in trained.items() if name not in plain], "weight_decay": spec.weight_decay},
        {"params": [p for name, p in trained.items() if name in plain], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]  # DeepSpeed makes shards of each; adapters fill one
    return torch.optim.AdamW(groups, lr=spec.learning_rate, betas=spec.betas, eps=ADAM_EPS)


def _deepspeed_config(spec: LearnerSpec, *, offload: bool) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": 3, "overlap_comm": spec.use_gpu}
    if offload:
        zero["offload_param"] = {"device": "cpu", "pin_memory": spec.use_gpu}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": spec.max_grad_norm,
        "bf16": {"enabled": spec.dtype == "bfloat16"},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1 << 31,
    }
