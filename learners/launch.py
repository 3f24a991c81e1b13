"""Starts a learner group: Ray Train v2 around :func:`learners.loop.train_loop`."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray.train
import ray.train.torch
from pyarrow.fs import FileSystem

from learners.protocols import (
    BatchSource,
    ExampleSource,
    LoopConfig,
    ProgressSink,
    SupervisedConfig,
    SupervisedLine,
)
from learners.spec import LearnerSpec
from vlcot.policy.family import read_config
from vlcot.weights import WeightSink

ray_train: Any = ray.train
"""Ray Train v2, the default since Ray 2.51; type checkers see the names of v1."""


def train_loop(config: dict[str, Any]) -> int:
    """:func:`learners.loop.train_loop`. Ray Train's controller unpickles this too, and the driver imports it: neither
    needs the engines."""
    from learners import loop

    return loop.train_loop(config)


def supervised_loop(config: dict[str, Any]) -> int:
    """:func:`learners.supervised_loop.supervised_loop`, as above."""
    from learners import supervised_loop

    return supervised_loop.supervised_loop(config)


@dataclass(frozen=True)
class LearnerResult:
    """``steps`` done, the exported policy, and the newest checkpoint (None when no step was ever made); the paths are
    those of the group's file system."""

    steps: int
    policy_path: Path
    checkpoint_path: Path | None


class WorkerGroup:
    """``spec.ranks`` workers that train in the background of the driver.

    A group with the same ``storage_path`` and ``name`` goes on from the newest checkpoint found there.

    Args:
        function: what each worker runs.
        loop: its arguments; travel into the workers by pickle.
        storage_path: directory of checkpoints; on all nodes the same.
        name: of the run inside ``storage_path``.
        files: the file system that ``storage_path`` is on, as pyarrow has it; None: the nodes' own.
        resources: of one worker, as Ray counts them; default one CPU, and one GPU with ``spec.use_gpu``.
        labels: of the nodes that may hold the workers; none: any node.

    Raises:
        FileNotFoundError: no checkpoint at ``policy_path`` or ``reference_path``.
        ValueError: a ``config.json`` that cannot be read, or a rank of LoRA that is too large for it.
    """

    def __init__(
        self,
        function: Callable[[dict[str, Any]], int],
        loop: LoopConfig | SupervisedConfig,
        storage_path: str | Path,
        name: str,
        resources: dict[str, float] | None = None,
        labels: dict[str, str] | None = None,
        files: FileSystem | None = None,
    ) -> None:
        for path in (loop.spec.policy_path, loop.spec.reference_path):
            if path is not None:
                config = read_config(path)
                if loop.spec.lora is not None:
                    loop.spec.lora.check(config)
        self.policy_path = Path(loop.export_path)
        self._function = function
        self._loop = loop
        self._spec = loop.spec
        self._storage = str(storage_path if files else Path(storage_path).absolute())
        self._files = files
        self._name = name
        self._resources = resources or ({"CPU": 1, "GPU": 1} if loop.spec.use_gpu else {"CPU": 1})
        self._labels = dict(labels or {})
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
            RuntimeError: the group was not started.
            ray.train.TrainingFailedError: training failed; also in :attr:`error`.
        """
        self._thread.join(timeout)
        if self._thread.is_alive():
            raise TimeoutError(f"learner group {self._name} is still running after {timeout} s")
        if self.error is not None:
            raise self.error
        assert self._result is not None  # _run sets one of the two
        return self._result

    def _run(self) -> None:
        try:
            self._result = self._fit()
        except BaseException as error:  # handed to the caller of result()
            self.error = error

    def _fit(self) -> LearnerResult:
        trainer = ray_train.torch.TorchTrainer(
            self._function,
            train_loop_config={"loop": self._loop},
            torch_config=ray_train.torch.TorchConfig(backend="nccl" if self._spec.use_gpu else "gloo"),
            scaling_config=ray_train.ScalingConfig(
                num_workers=self._spec.ranks,
                use_gpu=self._spec.use_gpu,
                resources_per_worker=self._resources,
                label_selector=self._labels or None,
            ),
            run_config=ray_train.RunConfig(
                name=self._name,
                storage_path=self._storage,
                storage_filesystem=self._files,
                failure_config=ray_train.FailureConfig(max_failures=self._spec.max_failures),
                checkpoint_config=ray_train.CheckpointConfig(num_to_keep=self._spec.keep_checkpoints),
                worker_runtime_env={"env_vars": _worker_environment(self._spec)},
            ),
        )
        result = trainer.fit()
        checkpoint = Path(result.checkpoint.path) if result.checkpoint else None
        return LearnerResult(int(result.return_value), self.policy_path, checkpoint)


class LearnerGroup(WorkerGroup):
    """Trains by GRPO.

    Args:
        spec: what to train.
        source: gives batches.
        sink: takes weights.
        progress: hears of every step.
        storage_path: directory of checkpoints and the exported policy.
        name, resources, labels, files: of :class:`WorkerGroup`.
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
        labels: dict[str, str] | None = None,
        files: FileSystem | None = None,
    ) -> None:
        policy = exported_policy(storage_path, name, files)
        loop = LoopConfig(spec, source, sink, progress, str(policy), files)
        super().__init__(train_loop, loop, storage_path, name, resources, labels, files)


class ColdStartGroup(WorkerGroup):
    """Trains on examples.

    Args:
        spec: what to train.
        source: gives examples.
        line: hears of every step, and says when to stop.
        dropout, z_loss, evaluate_every: of :class:`~learners.protocols.SupervisedConfig`.
        storage_path: directory of checkpoints and the exported policy.
        name, resources, labels, files: of :class:`WorkerGroup`.
    """

    def __init__(
        self,
        spec: LearnerSpec,
        source: ExampleSource,
        line: SupervisedLine,
        *,
        dropout: float,
        z_loss: float,
        evaluate_every: int,
        storage_path: str | Path,
        name: str,
        resources: dict[str, float] | None = None,
        labels: dict[str, str] | None = None,
        files: FileSystem | None = None,
    ) -> None:
        policy = exported_policy(storage_path, name, files)
        loop = SupervisedConfig(spec, source, line, dropout, z_loss, evaluate_every, str(policy), files)
        super().__init__(supervised_loop, loop, storage_path, name, resources, labels, files)


def exported_policy(storage_path: str | Path, name: str, files: FileSystem | None = None) -> Path:
    """Where the trained policy of a run goes; in ``files`` if there is one."""
    return (Path(storage_path) if files else Path(storage_path).absolute()) / name / "policy"


def _worker_environment(spec: LearnerSpec) -> dict[str, str]:
    threads = {name: str(spec.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    return {**threads, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
