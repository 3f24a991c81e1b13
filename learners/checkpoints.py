"""Learner checkpoints (shards, through Ray Train) and exported policies (one directory)."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

import ray.train
import torch
import torch.distributed as dist
from pyarrow.fs import FileSystem, FileType, copy_files
from safetensors.torch import save_file

from learners.adapters import Weight, write_adapters
from learners.engine import ShardedPolicy, gathered
from learners.protocols import ProgressSink
from learners.spec import LearnerSpec

POLICY_FILES = ("tokenizer.json", "generation_config.json")
"""Files of a policy directory, beside config and weights, that training does not change."""
ADAPTER_DIR = "adapter"
"""Directory of a policy trained with LoRA that holds the adapters alone."""


def save_checkpoint(policy: ShardedPolicy, step: int, metrics: dict[str, float]) -> None:
    """Commit shards, optimiser, step and RNG state of every rank as one checkpoint of the run. Collective.

    Each rank writes its own part; Ray Train copies the parts into one directory, commits it when all are there
    and removes those beyond the retention. Returns once it is committed: a rank that dies now restarts here.
    """
    with tempfile.TemporaryDirectory(prefix="learner-") as directory:
        policy.save(directory, {"step": step, "rng": torch.get_rng_state(), "ranks": dist.get_world_size()})
        ray.train.report({**metrics, "step": step}, checkpoint=ray.train.Checkpoint.from_directory(directory))
    ray.train.get_all_reported_checkpoints(ray.train.CheckpointConsistencyMode.COMMITTED)


def checkpoint(policy: ShardedPolicy, step: int, metrics: dict[str, float], progress: ProgressSink) -> int:
    """:func:`save_checkpoint`, and tell ``progress`` before and after; returns ``step``. Collective."""
    if dist.get_rank() == 0:
        progress.checkpointing(step)
    save_checkpoint(policy, step, metrics)
    if dist.get_rank() == 0:
        progress.checkpointed(step)
    return step


def restore_checkpoint(policy: ShardedPolicy) -> int:
    """Load the run's newest checkpoint, if there is one; collective.

    Returns:
        Steps done; 0 in a fresh run.
    """
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return 0
    with checkpoint.as_directory() as directory:
        state = policy.load(directory)
    torch.set_rng_state(state["rng"])
    return int(state["step"])


def export_policy(
    policy: ShardedPolicy, spec: LearnerSpec, directory: str | Path, files: FileSystem | None = None
) -> None:
    """Write the weights as a policy directory that can be ``policy_path`` of a later run. Collective.

    Rank 0 writes into a temporary neighbour that then takes the place of ``directory``: a reader sees the old
    policy or the new one. In a store (``files``) whoever finds ``config.json`` finds a whole policy. With LoRA the
    weights are the merged ones, and peft's files are in :data:`ADAPTER_DIR`
    (not beside the weights, where transformers would put the adapters on top of them once more).
    """
    tensors = _whole(policy.weights())
    factors = _whole(policy.adapters())
    if dist.get_rank() == 0:
        if files is None:
            _write_policy(tensors, factors, spec, Path(directory))
        else:
            with tempfile.TemporaryDirectory(prefix="policy-") as temporary:
                _write_policy(tensors, factors, spec, Path(temporary) / "policy")
                _upload_policy(Path(temporary) / "policy", files, str(directory))
    dist.barrier()


def _whole(weights: Mapping[str, Weight]) -> dict[str, torch.Tensor]:
    """Copies of the tensors on rank 0's CPU; empty on the others."""
    tensors = {}
    for name, weight in weights.items():
        with gathered(weight.parameters):
            if dist.get_rank() == 0:
                tensors[name] = weight.value().to("cpu", copy=True).contiguous()
    return tensors


def _write_policy(
    tensors: Mapping[str, torch.Tensor], factors: Mapping[str, torch.Tensor], spec: LearnerSpec, target: Path
) -> None:
    source = Path(spec.policy_path)
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    save_file(dict(tensors), fresh / "model.safetensors", metadata={"format": "pt"})
    if spec.lora is not None:
        write_adapters(factors, spec.lora, source, fresh / ADAPTER_DIR)
    config = json.loads((source / "config.json").read_text()) | {"dtype": spec.dtype}
    (fresh / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    for name in POLICY_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, fresh / name)
    fresh.chmod(0o755)  # mkdtemp makes it private
    if target.exists():
        old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
        os.replace(target, old / target.name)
        os.replace(fresh, target)
        shutil.rmtree(old)
    else:
        os.replace(fresh, target)


def _upload_policy(policy: Path, files: FileSystem, target: str) -> None:
    """Put ``config.json`` last; that of an older policy goes first."""
    last = "config.json"
    if files.get_file_info(f"{target}/{last}").type != FileType.NotFound:
        files.delete_file(f"{target}/{last}")
    written = [path for path in policy.rglob("*") if path.is_file()]
    for path in sorted(written, key=lambda path: path == policy / last):
        place = f"{target}/{path.relative_to(policy).as_posix()}"
        files.create_dir(place.rpartition("/")[0], recursive=True)
        copy_files(str(path), place, destination_filesystem=files, use_threads=False)
