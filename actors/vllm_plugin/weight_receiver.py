"""Weights from files on the worker's node into the running model, with a checksum of every tensor.

What is checked, and where:

* *Received*: the worker reads the buckets and compares the CRC-32 of each tensor with the sender's, before
  the model is touched. A push that arrived wrong is refused and the old weights go on serving.
* *Loaded*: after vLLM's own loading, the CRC-32 of each parameter of the model, fused projections cut back
  into their parts, is compared with what was received (cast to the model's dtype). Linear layers are read
  at the moment before vLLM packs them for the CPU and drops the plain weight; so the packing itself is the
  one step that no checksum covers (log-prob parity after a push does). With tensor parallelism a rank has
  only shards, and this second check is left out.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from vlcot.weights import Bucket, TensorSpec, checksum, unpack

FUSED_PARTS = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def bucket_file(directory: str | Path, index: int) -> Path:
    """Where bucket ``index`` of a push lies."""
    return Path(directory) / f"{index}.bucket"


def report_file(directory: str | Path, rank: int) -> Path:
    """Where worker ``rank`` writes its report: JSON with ``checksums`` (received), ``loaded`` (how many
    parameters were compared) and ``seconds`` (``verify``, ``load``)."""
    return Path(directory) / f"rank{rank}.json"


@dataclass
class InitInfo(WeightTransferInitInfo):
    """Nothing to set up."""


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):
    """One step of a push.

    Attributes:
        action: ``verify`` compares the files with ``checksums``; ``load`` puts them into the model.
        directory: holds one :func:`bucket_file` per bucket.
        layout: per bucket its tensors as [name, shape, dtype].
        checksums: tensor name -> the sender's CRC-32.
    """

    action: str
    directory: str
    layout: list[list[Any]]
    checksums: dict[str, int]

    def buckets(self) -> tuple[Bucket, ...]:
        """The layout as specs."""
        return tuple(tuple(TensorSpec(n, tuple(s), d) for n, s, d in bucket) for bucket in self.layout)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Name and tensor, bucket by bucket."""
        for index, bucket in enumerate(self.buckets()):
            yield from unpack(bucket, np.fromfile(bucket_file(self.directory, index), dtype=np.uint8))


class FileWeightReceiver(WeightTransferEngine[InitInfo, UpdateInfo]):
    """vLLM weight transfer backend ``vlcot_files``.

    One push is ``start_weight_update``, ``update_weights`` with ``verify``, ``update_weights`` with ``load``
    and ``finish_weight_update``. Generation need only be paused from ``load`` on.
    """

    init_info_cls = InitInfo
    update_info_cls = UpdateInfo
    supports_draft_weight_update = False

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        """Nothing to set up."""

    def start_weight_update(self) -> None:
        """Begin a push; the model is not touched until its bytes are known to be right."""
        self._received: dict[str, int] = {}
        self._seconds = {"verify": 0.0, "load": 0.0}

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """As in the base class, without its device synchronisation, which a CPU has not."""
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: UpdateInfo) -> None:
        """Verify or load (:class:`UpdateInfo`).

        Raises:
            ValueError: a tensor whose checksum differs, by name; a tensor without a checksum or the reverse.
        """
        started = time.perf_counter()
        if update_info.action == "verify":
            self._verify(update_info)
        elif update_info.action == "load":
            self._load(update_info)
        else:
            raise ValueError(f"unknown action {update_info.action!r}: verify or load")
        self._seconds[update_info.action] += time.perf_counter() - started

    def _verify(self, update: UpdateInfo) -> None:
        expected, model_dtype = dict(update.checksums), self.model_config.dtype
        self._expected_loaded: dict[str, int] = {}
        for name, tensor in update.tensors():
            self._received[name] = checksum(tensor)
            if expected.pop(name, None) != self._received[name]:
                raise ValueError(f"tensor {name}: the checksum of what arrived is not the sender's")
            cast = tensor.dtype != model_dtype
            self._expected_loaded[name] = checksum(tensor.to(model_dtype)) if cast else self._received[name]
        if expected:
            raise ValueError(f"tensor {next(iter(expected))} has a checksum but is in no bucket")

    def _load(self, update: UpdateInfo) -> None:
        self._directory = update.directory
        self._loaded: dict[str, int] = {}
        initialize_layerwise_reload(self.model)
        self._watched = [_Watch(name, layer, self._loaded) for name, layer in _linear_layers(self.model)]
        model: Any = self.model
        model.load_weights(update.tensors())

    def finish_weight_update(self) -> None:
        """Complete the loading, compare the model's parameters with what was received, write the report.

        Raises:
            ValueError: a parameter that is not what was received, or was not in the push, by name.
        """
        started = time.perf_counter()
        finalize_layerwise_reload(self.model, self.model_config)
        self._seconds["load"] += time.perf_counter() - started
        started = time.perf_counter()
        for watch in self._watched:
            watch.release()
        whole = get_tensor_model_parallel_world_size() == 1
        if whole:
            self._loaded.update(_plain_checksums(self.model, self.model_config.hf_config.vocab_size))
            _compare(self._loaded, self._expected_loaded)
        self._seconds["verify"] += time.perf_counter() - started
        report = {
            "checksums": self._received,
            "loaded": len(self._loaded) if whole else 0,
            "seconds": self._seconds,
        }
        report_file(self._directory, get_tensor_model_parallel_rank()).write_text(json.dumps(report))

    def shutdown(self) -> None:
        """Nothing is held."""


def _compare(loaded: Mapping[str, int], expected: Mapping[str, int]) -> None:
    for name in sorted(loaded.keys() | expected.keys()):
        if name not in expected:
            raise ValueError(f"tensor {name}: the model has it, the push has not")
        if name not in loaded:
            raise ValueError(f"tensor {name}: the push has it, the model has not")
        if loaded[name] != expected[name]:
            raise ValueError(f"tensor {name}: the checksum of the loaded parameter is not that of what arrived")


def _linear_layers(model: nn.Module) -> Iterator[tuple[str, LinearBase]]:
    return ((name, layer) for name, layer in model.named_modules() if isinstance(layer, LinearBase))


def _plain_checksums(model: nn.Module, vocab_size: int) -> dict[str, int]:
    """Checksums of the parameters outside of linear layers; padding rows of the vocabulary cut off."""
    sums = {}
    for layer_name, layer in model.named_modules():
        if isinstance(layer, LinearBase):
            continue
        for name, param in layer.named_parameters(recurse=False):
            rows = param[:vocab_size] if isinstance(layer, VocabParallelEmbedding) else param
            sums[f"{layer_name}.{name}"] = checksum(rows)
    return sums


class _Watch:
    """Takes the checksums of a linear layer's parts just before vLLM packs the weight."""

    def __init__(self, name: str, layer: LinearBase, into: dict[str, int]) -> None:
        method: Any = layer.quant_method
        pack = method.process_weights_after_loading

        def watched(target: LinearBase) -> None:
            into.update(_parts(name, target))
            pack(target)

        method.process_weights_after_loading = watched
        self._method = method

    def release(self) -> None:
        """Give the layer its own method back."""
        del self._method.process_weights_after_loading


def _parts(name: str, layer: LinearBase) -> dict[str, int]:
    parent, _, own = name.rpartition(".")
    names = FUSED_PARTS.get(own, (own,))
    sums: dict[str, int] = {}
    for param_name, param in layer.named_parameters(recurse=False):
        pieces = param.split(layer.output_sizes) if len(names) > 1 else (param,)
        sums |= {f"{parent}.{n}.{param_name}": checksum(piece) for n, piece in zip(names, pieces, strict=True)}
    return sums
