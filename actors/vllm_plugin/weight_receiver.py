"""Weights from files on the worker's node into the running model, with a checksum of every tensor.

What is checked, and where:

* *Received*: the actor compares the XXH3 of each tensor with the sender's as the buckets come
  (:class:`actors.push.IncomingPush`), while generation goes on. A push that arrived wrong is refused before the engine
  hears of it, and the old weights go on serving.
* *Loaded*: after vLLM's own loading, the XXH3 of each parameter of the model, fused projections cut back
  into their parts, is compared with what was received (cast to the model's dtype). Linear layers are read
  at the moment before vLLM packs them for the CPU and drops the plain weight; so the packing itself is the
  one step that no checksum covers (log-prob parity after a push does). With tensor parallelism a rank has
  only shards, and this second check is left out.
"""

from __future__ import annotations

import json
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
    """Where worker ``rank`` writes its report: JSON with ``loaded``, how many parameters were compared."""
    return Path(directory) / f"rank{rank}.json"


@dataclass
class InitInfo(WeightTransferInitInfo):
    """Nothing to set up."""


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):
    """One push.

    Attributes:
        directory: holds one :func:`bucket_file` per bucket.
        layout: per bucket its tensors as [name, shape, dtype].
        checksums: tensor name -> XXH3.
    """

    directory: str
    layout: list[list[Any]]
    checksums: dict[str, int]

    def buckets(self) -> tuple[Bucket, ...]:
        """The layout as specs."""
        return tuple(tuple(TensorSpec(n, tuple(s), d) for n, s, d in bucket) for bucket in self.layout)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Name and tensor, bucket by bucket."""
        for index, bucket in enumerate(self.buckets()):
            # Private pages: vLLM takes the bytes from where they lie, and whoever writes writes a copy.
            yield from unpack(bucket, np.memmap(bucket_file(self.directory, index), np.uint8, mode="c"))


class FileWeightReceiver(WeightTransferEngine[InitInfo, UpdateInfo]):
    """vLLM weight transfer backend ``vlcot_files``.

    One push is ``start_weight_update``, ``update_weights`` and ``finish_weight_update``, generation paused.
    """

    init_info_cls = InitInfo
    update_info_cls = UpdateInfo
    supports_draft_weight_update = False

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        """Nothing to set up."""

    def start_weight_update(self) -> None:
        """Nothing to prepare."""

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """As in the base class, without its device synchronisation, which a CPU has not."""
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: UpdateInfo) -> None:
        """Put the tensors into the model."""
        self._directory = update_info.directory
        self._expected = dict(update_info.checksums)
        self._loaded: dict[str, int] = {}
        initialize_layerwise_reload(self.model)
        self._watched = [_Watch(name, layer, self._loaded) for name, layer in _linear_layers(self.model)]
        model: Any = self.model
        model.load_weights(self._as_loaded(update_info.tensors()))

    def _as_loaded(self, tensors: Iterator[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """In the model's dtype; what is cast gets a checksum of its own to be compared with."""
        for name, tensor in tensors:
            if tensor.dtype != self.model_config.dtype:
                tensor = tensor.to(self.model_config.dtype)
                self._expected[name] = checksum(tensor)
            yield name, tensor

    def finish_weight_update(self) -> None:
        """Complete the loading, compare the model's parameters with what was received, write the report.

        Raises:
            ValueError: a parameter that is not what was received, or was not in the push, by name.
        """
        finalize_layerwise_reload(self.model, self.model_config)
        for watch in self._watched:
            watch.release()
        whole = get_tensor_model_parallel_world_size() == 1
        if whole:
            self._loaded.update(_plain_checksums(self.model, self.model_config.hf_config.vocab_size))
            _compare(self._loaded, self._expected)
        report = {"loaded": len(self._loaded) if whole else 0}
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
