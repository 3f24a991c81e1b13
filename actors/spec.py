"""Settings of one rollout actor."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

DTYPES = ("float32", "bfloat16", "float16")
ON_PUSH = ("continue", "restart")


@dataclass(frozen=True)
class RolloutSpec:
    """How a rollout actor samples.

    Attributes:
        policy: directory of the policy (:class:`vlcot.policy.family.Family`); weights of version 0.
        image_tokenizer: directory of the VQ image tokenizer.
        group_size: samples per prompt (G).
        temperature: of the sampling distribution; also the learner's.
        max_new_tokens: longest chain; a chain that reaches it ends with ``length``.
        max_num_seqs: sequences that one actor samples at the same time.
        kv_cache_gib: GiB of key/value cache; None takes ``gpu_memory_utilization`` of the device instead.
        dtype: of the weights and activations in vLLM.
        on_push: what new weights do to a chain that is being sampled: ``continue`` (it goes on with them, behind ids
            and key/value blocks of the old ones) or ``restart`` (it begins again; what it had is thrown away).
        seed: of the run; an actor's engine has ``seed`` + its index.
        threads: CPU threads of the engine and of image decoding.
        tensor_parallel_size: devices per actor.
        gpu_memory_utilization: share of the device that vLLM may take.
        enforce_eager: no CUDA graphs; always so on a CPU.
    """

    policy: str
    image_tokenizer: str
    group_size: int = 8
    temperature: float = 1.0
    max_new_tokens: int = 512
    max_num_seqs: int = 32
    kv_cache_gib: float | None = 1.0
    dtype: str = "float32"
    on_push: str = "continue"
    seed: int = 0
    threads: int = 1
    tensor_parallel_size: int = 1
    gpu_memory_utilization: float = 0.9
    enforce_eager: bool = True

    def __post_init__(self) -> None:
        for name in ("group_size", "max_new_tokens", "max_num_seqs", "threads", "tensor_parallel_size"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"rollout.{name} must be a positive whole number, got {value!r}")
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"rollout.temperature must be positive, got {self.temperature}")
        if self.kv_cache_gib is not None and not 0 < self.kv_cache_gib < float("inf"):
            raise ValueError(f"rollout.kv_cache_gib must be positive or null, got {self.kv_cache_gib}")
        if self.dtype not in DTYPES:
            raise ValueError(f"rollout.dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if self.on_push not in ON_PUSH:
            raise ValueError(f"rollout.on_push must be one of {', '.join(ON_PUSH)}, got {self.on_push!r}")
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ValueError(f"rollout.gpu_memory_utilization must lie in (0, 1], got {self.gpu_memory_utilization}")
        if self.seed < 0:
            raise ValueError(f"rollout.seed must not be negative, got {self.seed}")

    def check_paths(self) -> None:
        """Look for the checkpoints, on the machine that will read them.

        Raises:
            ValueError: a directory has no ``config.json``.
        """
        for name in ("policy", "image_tokenizer"):
            if not (Path(getattr(self, name)) / "config.json").is_file():
                raise ValueError(f"rollout.{name}: no checkpoint at {getattr(self, name)} (config.json is missing)")
