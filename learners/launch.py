"""Starts a learner group: Ray Train v2 around :func:`learners.loop.train_loop`."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from pathlib import Path

from learners.loop import LoopConfig, train_loop
from learners.protocols import BatchSource, ProgressSink
from learners.spec import LearnerSpec
from vlcot.policy.family import read_config
from vlcot.weights import WeightSink


@dataclass(frozen=True)
class LearnerResult:
    """``steps`` done, the exported policy, and the newest checkpoint (None when no step was made)."""

    steps: int
    policy_path: Path
    checkpoint_path: Path


class LearnerGroup:
    """``spec.ranks`` workers that train in the background of the driver.

    A group with the same ``storage_path`` and ``name`` goes on from the newest checkpoint found there.

    Args:
        spec: what to train.
        source: gives batches; with ``sink`` and ``progress`` it travels into the workers by pickle.
        sink: takes weights.
        progress: hears of every step.
        storage_path: directory of checkpoints and the exported policy; on all nodes the same.
        name: of the run inside ``storage_path``.
        resources: of one worker, as Ray counts them; default one CPU, and one GPU with ``spec.use_gpu``.

    Raises:
        FileNotFoundError: no checkpoint at ``policy_path`` or ``reference_path``.
        ValueError: ``bfloat16`` without a GPU, or a directory that holds no policy.
    """

    def __init__(
        self,
        spec: LearnerSpec,
        source: BatchSource,
        sink: WeightSink,
        progress: ProgressSink,
        storage_path: str | Path,
        name: str,
        resources: dict[str, float] | None = None,
    ) -> None:
        for path in (spec.policy_path, spec.reference_path):
            if path is not None:
                read_config(path)
        self.policy_path = Path(storage_path).absolute() / name / "policy"
        self._spec = spec
        self._loop = LoopConfig(spec, source, sink, progress, str(self.policy_path))
        self._storage = Path(storage_path).absolute()
        self._name = name
        self._resources = resources or ({"CPU": 1, "GPU": 1} if spec.use_gpu else {"CPU": 1})
        self._thread = threading.Thread(target=self._run, name=f"learners-{name}", daemon=True)
        self._result: LearnerResult | None = None
        self.error: BaseException | None = None
        """Why training failed; None while it runs and when it ended well."""

    def start(self) -> None:
        """Begin to train; returns at once. Ray must be initialised.

        Raises:
            RuntimeError: the group was started before.
        """
        self._thread.start()

    @property
    def running(self) -> bool:
        """Whether the group is at work."""
        return self._thread.is_alive()

    def result(self, timeout: float | None = None) -> LearnerResult:
        """Wait for the end, at most ``timeout`` seconds.

        Raises:
            TimeoutError: still running.
            ray.train.TrainingFailedError: training failed; also in :attr:`error`.
        """
        self._thread.join(timeout)
        if self._thread.is_alive():
            raise TimeoutError(f"learner group {self._name} is still running after {timeout} s")
        if self.error is not None:
            raise self.error
        if self._result is None:
            raise RuntimeError(f"learner group {self._name} was not started")
        return self._result

    def _run(self) -> None:
        try:
            self._result = self._fit()
        except BaseException as error:  # handed to the caller of result()
            self.error = error

    def _fit(self) -> LearnerResult:
        os.environ["RAY_TRAIN_V2_ENABLED"] = "1"
        from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig, TorchTrainer

        trainer = TorchTrainer(
            train_loop,
            train_loop_config={"loop": self._loop},
            torch_config=TorchConfig(backend="nccl" if self._spec.use_gpu else "gloo"),
            scaling_config=ScalingConfig(
                num_workers=self._spec.ranks, use_gpu=self._spec.use_gpu, resources_per_worker=self._resources
            ),
            run_config=RunConfig(
                name=self._name,
                storage_path=str(self._storage),
                failure_config=FailureConfig(max_failures=self._spec.max_failures),
                checkpoint_config=CheckpointConfig(num_to_keep=self._spec.keep_checkpoints),
                worker_runtime_env={"env_vars": _worker_environment(self._spec)},
            ),
        )
        result = trainer.fit()
        return LearnerResult(int(result.return_value), self.policy_path, Path(result.checkpoint.path))


def _worker_environment(spec: LearnerSpec) -> dict[str, str]:
    threads = {name: str(spec.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    return {**threads, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
