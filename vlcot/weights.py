"""How weights travel: buckets of bytes in a fixed layout, and checksums per tensor."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import xxhash

if TYPE_CHECKING:  # the process that only keeps buckets of bytes does without it, and is up sooner
    import torch


@dataclass(frozen=True)
class TensorSpec:
    """Name, shape and dtype (``float32``, ``bfloat16``, ...) of one tensor."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return int(np.prod(self.shape, dtype=np.int64)) * _dtype(self.dtype).itemsize


Bucket = tuple[TensorSpec, ...]


def plan_buckets(specs: Sequence[TensorSpec], bucket_bytes: int) -> tuple[Bucket, ...]:
    """Split ``specs`` in order into buckets of at most ``bucket_bytes``; a larger tensor has its own bucket.

    Raises:
        ValueError: ``bucket_bytes`` is not positive, or a name stands twice.
    """
    if bucket_bytes <= 0:
        raise ValueError(f"bucket_bytes must be positive, got {bucket_bytes}")
    if len({spec.name for spec in specs}) != len(specs):
        raise ValueError("a tensor name stands twice in the layout")
    buckets: list[list[TensorSpec]] = []
    used = 0
    for spec in specs:
        if not buckets or used + spec.nbytes > bucket_bytes:
            buckets.append([])
            used = 0
        buckets[-1].append(spec)
        used += spec.nbytes
    return tuple(tuple(bucket) for bucket in buckets)


def pack(bucket: Bucket, tensors: Mapping[str, torch.Tensor]) -> np.ndarray:
    """uint8 [sum of nbytes]: the tensors of ``bucket`` one after another.

    Raises:
        ValueError: a tensor is missing, or has another shape or dtype than its spec.
    """
    parts = []
    for spec in bucket:
        tensor = tensors.get(spec.name)
        if tensor is None:
            raise ValueError(f"no tensor {spec.name} to pack")
        if tuple(tensor.shape) != spec.shape or tensor.dtype != _dtype(spec.dtype):
            raise ValueError(f"{spec.name} is {tuple(tensor.shape)} {tensor.dtype}, the layout says {spec}")
        parts.append(_bytes_of(tensor))
    return np.concatenate(parts) if parts else np.empty(0, dtype=np.uint8)


def unpack(bucket: Bucket, data: np.ndarray) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and tensor for each spec of ``bucket``: views of ``data``, which must be writable.

    Raises:
        ValueError: ``data`` has not exactly the bucket's size.
    """
    import torch

    for spec, part in _cut(bucket, data):
        yield spec.name, torch.from_numpy(part).view(_dtype(spec.dtype)).reshape(spec.shape)


def bucket_checksums(bucket: Bucket, data: np.ndarray) -> dict[str, int]:
    """:func:`checksum` of each tensor in ``data`` (uint8, may be read-only), by name.

    Raises:
        ValueError: ``data`` has not exactly the bucket's size.
    """
    return {spec.name: xxhash.xxh3_64_intdigest(part.data) for spec, part in _cut(bucket, data)}


def _cut(bucket: Bucket, data: np.ndarray) -> Iterator[tuple[TensorSpec, np.ndarray]]:
    expected = sum(spec.nbytes for spec in bucket)
    if data.dtype != np.uint8 or data.size != expected:
        raise ValueError(f"bucket holds {data.size} bytes of {data.dtype}, the layout says {expected} of uint8")
    offset = 0
    for spec in bucket:
        yield spec, data[offset : offset + spec.nbytes]
        offset += spec.nbytes


def checksum(tensor: torch.Tensor) -> int:
    """XXH3 (64 bit) of the tensor's bytes (native order, contiguous)."""
    return xxhash.xxh3_64_intdigest(_bytes_of(tensor).data)


def checksums(tensors: Iterable[tuple[str, torch.Tensor]]) -> dict[str, int]:
    """:func:`checksum` by name."""
    return {name: checksum(tensor) for name, tensor in tensors}


def _bytes_of(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().to("cpu").contiguous().reshape(-1).view(_dtype("uint8")).numpy()


def _dtype(name: str) -> torch.dtype:
    import torch

    dtype: torch.dtype = getattr(torch, name)
    return dtype


@dataclass(frozen=True)
class PushReport:
    """One weight push as the receivers saw it.

    Attributes:
        version: of the weights that all receivers now serve.
        seconds: wall seconds per phase (``transfer``, ``verify``, ``pause``, ``load``, ``resume``); generation stands
            still in the last three.
        nbytes: bytes of all buckets.
        receivers: how many actors took the push.
    """

    version: int
    seconds: Mapping[str, float]
    nbytes: int
    receivers: int


class WeightSink(Protocol):
    """Where a learner's publisher sends weights. Picklable; used from rank 0 of the learner group."""

    def begin(self, version: int, layout: Sequence[Bucket]) -> None:
        """Announce a push."""

    def send(self, index: int, data: np.ndarray) -> None:
        """Hand over bucket ``index`` (uint8, :func:`pack`); may return before it has arrived."""

    def finish(self, checksums: Mapping[str, int]) -> PushReport:
        """Load on every receiver, compare checksums per tensor, serve the new version.

        Raises:
            RuntimeError: a receiver's checksum differs, with the tensor's name.
        """
