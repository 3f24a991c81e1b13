"""A published checkpoint as it lies on disk: names, shapes and dtypes first, values one tensor at a time.

Safetensors files are read here rather than by the library, so that a truncated file is refused with the tensor at
which it breaks off, and so that no mapped copy of a shard stands beside the values. Pickles are only ever opened with
``weights_only=True``, which runs none of their code.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import math
import pickle
import pickletools
import re
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO

import torch

INDEX_FILES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
SINGLE_FILES = ("model.safetensors", "pytorch_model.bin")
CONTAINERS = ("ema", "model", "state_dict")
"""Where a training checkpoint keeps its weights, in LlamaGen's order of preference (``vq_demo.py``)."""
FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPES = FLOATS | {"F64": torch.float64, "I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool}
MAX_HEADER_BYTES = 100_000_000
"""Of a safetensors header (the library's own limit), and of a pickle that is searched for a name."""


class ImportRefused(ValueError):
    """A checkpoint that is not what it should be; the message names file and tensor."""


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies and what it is. ``offset``: its first byte in a safetensors file."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int = 0

    @property
    def bytes(self) -> int:
        """Length of its values."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Checkpoint:
    """All tensors of a checkpoint, by name, in the order of its files. No values are held.

    Attributes:
        path: what was opened, a folder or one file.
        files: the weight files, in order.
        tensors: name -> :class:`TensorInfo`.
    """

    path: Path
    files: tuple[Path, ...]
    tensors: Mapping[str, TensorInfo]

    @classmethod
    def open(cls, path: str | Path, first: str | None = None) -> Checkpoint:
        """Read the headers of one weight file, or of a Hugging Face folder with or without an index.

        Args:
            path: file or folder.
            first: a tensor that must be in it, for the message when a file cannot be opened at all.

        Raises:
            ImportRefused: nothing there, a broken or unsafe file, a tensor in two shards, or an index that says
                other than its shards.
        """
        path = Path(path)
        if path.is_file():
            return cls(path, (path,), _read_header(path, first))
        for name in INDEX_FILES:
            if (path / name).is_file():
                return cls._open_sharded(path, _read_index(path / name))
        for name in SINGLE_FILES:
            if (path / name).is_file():
                return cls(path, (path / name,), _read_header(path / name, first))
        raise ImportRefused(f"{path}: no weights there; looked for {', '.join(INDEX_FILES + SINGLE_FILES)}")

    @classmethod
    def _open_sharded(cls, folder: Path, weight_map: dict[str, str]) -> Checkpoint:
        tensors: dict[str, TensorInfo] = {}
        files = tuple(folder / name for name in sorted(set(weight_map.values())))
        for file in files:
            first = next(name for name, shard in weight_map.items() if shard == file.name)
            if not file.is_file():
                raise ImportRefused(f"{file}: the shard is missing; it should hold {first!r}")
            for name, info in _read_header(file, first).items():
                if name in tensors:
                    raise ImportRefused(f"{file}: tensor {name!r} is already in {tensors[name].file.name}")
                if weight_map.get(name) != file.name:
                    raise ImportRefused(f"{file}: tensor {name!r} is there, but the index does not say so")
                tensors[name] = info
        for name, shard in weight_map.items():
            if name not in tensors:
                raise ImportRefused(f"{folder / shard}: tensor {name!r} is missing, though the index says it is there")
        return cls(folder, files, tensors)

    def values(self, names: list[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """The named tensors on the CPU, in the given order; one file is open at a time, read tensor by tensor.

        Raises:
            ImportRefused: a value that is not finite.
        """
        for file, group in groupby(names, key=lambda name: self.tensors[name].file):
            loaded = {} if file.suffix == ".safetensors" else _load_torch(file, "cpu", "")  # mapped, not read
            with file.open("rb") as stream:
                for name in group:
                    tensor = loaded[name] if loaded else _read_tensor(stream, name, self.tensors[name])
                    if not all(torch.isfinite(end) for end in tensor.aminmax()):  # NaN is its own extreme
                        raise ImportRefused(f"{file}: tensor {name!r} holds NaN or infinite values")
                    yield name, tensor
                    del tensor  # before the next one is read


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ImportRefused: no such file, or no JSON object in it.
    """
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise ImportRefused(f"{path} does not exist") from error
    except (ValueError, RecursionError) as error:
        raise ImportRefused(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ImportRefused(f"{path} must hold a JSON object")
    return value


def _read_index(path: Path) -> dict[str, str]:
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ImportRefused(f"{path} has no 'weight_map'")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise ImportRefused(f"{path}: tensor {name!r} must name a file beside the index, not {shard!r}")
    return weight_map


def _read_header(path: Path, first: str | None) -> dict[str, TensorInfo]:
    """``first``: a tensor that the file should hold, for the message when it cannot even be opened."""
    hint = f" (it should hold {first!r})" if first else ""
    if path.suffix == ".safetensors":
        return _read_safetensors_header(path, hint)
    infos = {}
    for name, value in _load_torch(path, "meta", hint).items():
        if not isinstance(value, torch.Tensor):
            raise ImportRefused(f"{path}: {name!r} is a {type(value).__name__}, not a tensor")
        infos[str(name)] = TensorInfo(path, value.dtype, tuple(value.shape))
    return infos


def _read_safetensors_header(path: Path, hint: str) -> dict[str, TensorInfo]:
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
            raise ImportRefused(f"{path} is truncated, or no safetensors file: it has no whole header{hint}")
        try:
            header = json.loads(file.read(length))
        except (ValueError, RecursionError) as error:
            raise ImportRefused(f"{path} is no safetensors file: its header is not JSON{hint}") from error
    if not isinstance(header, dict):
        raise ImportRefused(f"{path} is no safetensors file: its header is not a JSON object{hint}")
    header.pop("__metadata__", None)
    infos, taken = {}, 0
    for name, entry in header.items():
        infos[name] = info = _header_entry(path, name, entry, 8 + length)
        if info.offset + info.bytes > size:
            raise ImportRefused(
                f"{path} is truncated: tensor {name!r} ends at byte {info.offset + info.bytes} of {size}"
            )
        taken += info.bytes
    if taken != size - 8 - length:
        raise ImportRefused(f"{path}: its tensors take {taken} bytes, but it holds {size - 8 - length}")
    return infos


def _header_entry(path: Path, name: str, entry: Any, start: int) -> TensorInfo:
    try:
        shape, (begin, end) = tuple(int(n) for n in entry["shape"]), map(int, entry["data_offsets"])
        kind, stored = str(entry["dtype"]), end - begin
    except (TypeError, KeyError, ValueError, OverflowError) as error:
        raise ImportRefused(f"{path}: the header entry of tensor {name!r} is broken") from error
    if kind not in DTYPES:
        raise ImportRefused(f"{path}: tensor {name!r} has dtype {kind}; {', '.join(FLOATS)} needed")
    if begin < 0 or min(shape, default=1) < 1 or math.prod(shape) * DTYPES[kind].itemsize != stored:
        raise ImportRefused(f"{path}: tensor {name!r} of shape {list(shape)} in {kind} cannot take {stored} bytes")
    return TensorInfo(path, DTYPES[kind], shape, start + begin)


def _read_tensor(stream: BinaryIO, name: str, info: TensorInfo) -> torch.Tensor:
    buffer = bytearray(info.bytes)
    stream.seek(info.offset)
    if stream.readinto(buffer) != len(buffer):  # type: ignore[attr-defined]  # of BufferedReader
        raise ImportRefused(f"{info.file} is truncated: tensor {name!r} breaks off")
    return torch.frombuffer(buffer, dtype=info.dtype).view(info.shape)


def _load_torch(path: Path, device: str, hint: str) -> dict[Any, Any]:
    """The state dict of a torch file; ``device="meta"`` reads no values."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # "args" of LlamaGen's training checkpoints
            loaded = torch.load(path, map_location=device, weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        wanted = re.search(r"GLOBAL ([\w.]+)", str(error))
        why = "it is no pickle of plain tensors"
        if wanted:
            why = f"it is a pickle that wants to run {wanted[1]}{_place_in_pickle(path, wanted[1])}"
        raise ImportRefused(f"{path} is refused, nothing of it was run: {why}{hint}") from error
    except OSError:
        raise
    except Exception as error:  # on garbage the unpickler raises whatever comes
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ImportRefused(f"{path} is truncated, or no torch checkpoint{hint}: {reason}") from error
    if isinstance(loaded, dict):
        loaded = next((loaded[key] for key in CONTAINERS if isinstance(loaded.get(key), dict)), loaded)
    if not isinstance(loaded, dict) or not loaded:
        raise ImportRefused(f"{path} holds a {type(loaded).__name__}, not tensors by name{hint}")
    return loaded


def _place_in_pickle(path: Path, wanted: str) -> str:
    """The last string before the first use of ``wanted``: the key it stands at. The operations are read, not run."""
    last = None
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                name = next(name for name in archive.namelist() if name.endswith("data.pkl"))
                with archive.open(name) as file:
                    stream = io.BytesIO(file.read(MAX_HEADER_BYTES))
        else:
            with path.open("rb") as file:
                stream = io.BytesIO(file.read(MAX_HEADER_BYTES))
        while True:  # torch's older format is several pickles in a row
            for operation, argument, _ in pickletools.genops(stream):
                if operation.name == "GLOBAL" and str(argument).replace(" ", ".") == wanted:
                    return f" at {last!r}" if last else ""
                if "UNICODE" in operation.name:
                    last = argument
    except (ValueError, RuntimeError, StopIteration, zipfile.BadZipFile):  # the end, or not made by torch
        return ""
