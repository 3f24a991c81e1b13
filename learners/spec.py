"""Everything that a learner group must know, in one picklable value."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from vlcot.grpo import AdvantageConfig, LossConfig

Schedule = Literal["constant", "cosine"]
Dtype = Literal["float32", "bfloat16"]

LINEAR_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""Linear layers of a decoder layer."""


def linear_shapes(hidden: int, key_values: int, wide: int) -> dict[str, tuple[int, int]]:
    """Outputs and inputs of each of :data:`LINEAR_LAYERS`, from the widths of stream, all key heads and MLP."""
    square, keys, up, down = (hidden, hidden), (key_values, hidden), (wide, hidden), (hidden, wide)
    return dict(zip(LINEAR_LAYERS, (square, keys, keys, square, up, up, down), strict=True))


@dataclass(frozen=True)
class LoraSpec:
    """Low-rank adapters in place of training every weight (:mod:`learners.adapters`).

    Attributes:
        rank: of B A (r).
        alpha: B A counts alpha / rank times.
        targets: which of :data:`LINEAR_LAYERS`, in every decoder layer.
        dropout: of the adapters' input, in training.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...] = LINEAR_LAYERS
    dropout: float = 0.0

    def __post_init__(self) -> None:
        self._require("rank", self.rank >= 1, "at least 1")
        self._require("alpha", 0 < self.alpha < math.inf, "a positive number")
        self._require("dropout", 0 <= self.dropout < 1, "in [0, 1)")
        known = bool(self.targets) and set(self.targets) <= set(LINEAR_LAYERS)
        self._require("targets", known, f"some of {', '.join(LINEAR_LAYERS)}")
        self._require("targets", len(set(self.targets)) == len(self.targets), "each layer once")

    def _require(self, name: str, holds: bool, allowed: str) -> None:
        if not holds:
            value = getattr(self, name)
            said = list(value) if isinstance(value, tuple) else value
            raise ValueError(f"learner.lora.{name}={said} must be {allowed}")

    def check(self, config: Mapping[str, Any]) -> None:
        """Hold the rank against the policy's ``config.json``.

        Raises:
            ValueError: a target has fewer outputs or inputs than ``rank``, by name; or a width is missing.
        """
        try:
            hidden, heads, wide = (
                int(config[name]) for name in ("hidden_size", "num_attention_heads", "intermediate_size")
            )
            keys = int(config.get("num_key_value_heads") or heads)
        except (KeyError, TypeError) as error:
            raise ValueError(f"config.json is no VLCoT policy's: {error}") from None
        shapes = linear_shapes(hidden, keys * int(config.get("head_dim") or hidden // heads), wide)
        for name in self.targets:
            if self.rank > min(shapes[name]):
                rows, columns = shapes[name]
                raise ValueError(
                    f"learner.lora.rank={self.rank} is too large for {name}, a matrix of {rows} x {columns}: "
                    f"it must be at most {min(rows, columns)}, and saves memory far below that"
                )


@dataclass(frozen=True)
class LearnerSpec:
    """Settings of a learner group.

    Attributes:
        policy_path: policy directory that training starts from; its weights are version 0.
        reference_path: policy directory of the frozen reference of the KL (the cold-started model); None
            only where ``loss.kl_beta`` is 0.
        steps: optimisation steps; step ``s`` (1, 2, ...) makes weight version ``s``.
        groups_per_step: most groups that one step may receive.
        temperature: of the sampling distribution; must be the rollout's.
        max_staleness: oldest weights, in versions, that a trained token may come from (design I1).
        ranks: worker processes of the ZeRO-3 group.
        learning_rate: peak, after the warm-up.
        betas: of AdamW.
        weight_decay: of matrices and embeddings; norms and biases have none.
        warmup_steps: steps of linear warm-up.
        schedule: ``constant`` or ``cosine`` (to ``min_learning_rate`` at ``steps``).
        min_learning_rate: where the cosine ends.
        max_grad_norm: global gradient norm is clipped to this.
        epochs_per_batch: optimiser updates on each batch.
        micro_batch_tokens: most tokens, padding included, of one forward pass, in which the samples of a group share
            their prompt; what is longer goes alone.
        dtype: of the weights in forward, backward and push; the optimiser always holds float32.
        activation_checkpointing: backward computes each layer's activations again instead of keeping them.
        offload_reference: the frozen reference's shards are in host memory and come to the GPU layer by layer.
        seed: of everything random in a worker.
        threads: CPU threads per worker.
        bucket_bytes: size of one bucket of a weight push.
        checkpoint_every: steps between checkpoints; the last step always has one.
        keep_checkpoints: newest checkpoints that stay on disk.
        max_failures: restarts of the group from its last checkpoint; preempted nodes do not count.
        use_gpu: one GPU per rank (NCCL) instead of CPU (gloo).
        advantage: how rewards become advantages.
        loss: clipped loss and KL.
        lora: train adapters on frozen weights, which are then the reference of the KL too; None: train every weight.
    """

    policy_path: str
    reference_path: str | None
    steps: int
    groups_per_step: int
    temperature: float
    max_staleness: int
    ranks: int = 2
    learning_rate: float = 1e-6
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
    warmup_steps: int = 0
    schedule: Schedule = "constant"
    min_learning_rate: float = 0.0
    max_grad_norm: float = 1.0
    epochs_per_batch: int = 1
    micro_batch_tokens: int = 16384
    dtype: Dtype = "float32"
    activation_checkpointing: bool = False
    offload_reference: bool = False
    seed: int = 0
    threads: int = 1
    bucket_bytes: int = 1 << 28
    checkpoint_every: int = 50
    keep_checkpoints: int = 2
    max_failures: int = 2
    use_gpu: bool = False
    advantage: AdvantageConfig = field(default_factory=AdvantageConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    lora: LoraSpec | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "groups_per_step", "ranks", "epochs_per_batch", "micro_batch_tokens", "threads"):
            self._require(name, getattr(self, name) >= 1, "at least 1")
        for name in ("bucket_bytes", "checkpoint_every", "keep_checkpoints"):
            self._require(name, getattr(self, name) >= 1, "at least 1")
        for name in ("max_staleness", "warmup_steps", "max_failures", "seed"):
            self._require(name, getattr(self, name) >= 0, "0 or more")
        for name in ("temperature", "learning_rate", "max_grad_norm"):
            value = getattr(self, name)
            self._require(name, value > 0 and math.isfinite(value), "a positive number")
        highest = self.learning_rate
        self._require("min_learning_rate", 0 <= self.min_learning_rate <= highest, f"in [0, learning_rate={highest}]")
        self._require("weight_decay", 0 <= self.weight_decay < 1, "in [0, 1)")
        self._require("betas", len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas), "two in [0, 1)")
        self._require("warmup_steps", self.warmup_steps <= self.steps, f"no more than steps ({self.steps})")
        self._require("schedule", self.schedule in get_args(Schedule), f"one of {', '.join(get_args(Schedule))}")
        self._require("dtype", self.dtype in get_args(Dtype), f"one of {', '.join(get_args(Dtype))}")
        if self.loss.kl_beta > 0 and self.reference_path is None:
            raise ValueError(f"learner: kl_beta is {self.loss.kl_beta} but there is no reference_path to keep close to")
        if self.lora is not None and self.reference_path not in (None, self.policy_path):
            raise ValueError(
                f"learner: with lora the reference is the policy without its adapters, so reference_path must be "
                f"policy_path={self.policy_path}, not {self.reference_path}"
            )
        if self.lora is not None and self.offload_reference:
            raise ValueError("learner: offload_reference has nothing to move with lora, which keeps no reference")

    def _require(self, name: str, holds: bool, allowed: str) -> None:
        if not holds:
            raise ValueError(f"learner: {name} is {getattr(self, name)!r}; it must be {allowed}")

    def learning_rate_at(self, step: int) -> float:
        """Learning rate of step 1, 2, ..., ``steps``."""
        if step <= self.warmup_steps:
            return self.learning_rate * step / self.warmup_steps
        if self.schedule == "constant":
            return self.learning_rate
        progress = (step - self.warmup_steps - 1) / max(1, self.steps - self.warmup_steps)
        height = 0.5 * (1 + math.cos(math.pi * progress))
        return self.min_learning_rate + (self.learning_rate - self.min_learning_rate) * height
