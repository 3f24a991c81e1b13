"""Carry out an import: verify every name and shape, then convert and write shard by shard, or compare."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from vlcot.weight_import.source import FLOATS, Checkpoint, ImportRefused, TensorInfo, read_json, sha256

SHARD_BYTES = 2 * 1024**3
"""Largest shard written; the peak memory of an import is one shard and what converting the largest tensor takes."""

Shape = tuple[int, ...]
Report = Callable[[str], None]


@dataclass(frozen=True)
class Conversion:
    """What becomes of one tensor of the source.

    Attributes:
        target: its name in our format.
        shapes: shapes that the source may have.
        shape: shape that it gets.
        transform: values of the source to values of ours; None keeps them.
        dtype: dtype that it gets; None keeps the source's.
    """

    target: str
    shapes: tuple[Shape, ...]
    shape: Shape
    transform: Callable[[torch.Tensor], torch.Tensor] | None = None
    dtype: torch.dtype | None = None

    def apply(self, tensor: torch.Tensor) -> torch.Tensor:
        """The converted tensor, contiguous."""
        dtype = self.dtype or tensor.dtype
        converted = tensor if self.transform is None else self.transform(tensor)
        return converted.to(dtype).contiguous()


@dataclass(frozen=True)
class Plan:
    """A whole import.

    Attributes:
        conversions: by name in the source; all of them must be there.
        dropped: whether a tensor of the source is left out on purpose.
        config: our ``config.json``.
        notes: lines of the card, saying what was changed.
        copies: further files: name in our folder -> where it comes from.
    """

    conversions: Mapping[str, Conversion]
    dropped: Callable[[str], bool]
    config: Mapping[str, Any]
    notes: tuple[str, ...]
    copies: Mapping[str, Path] = field(default_factory=dict)

    @property
    def parameters(self) -> int:
        """Number of values written."""
        return sum(torch.Size(c.shape).numel() for c in self.conversions.values())


def verify(checkpoint: Checkpoint, plan: Plan) -> None:
    """Every tensor of the plan is there, a float of its shape, and no other but the dropped ones.

    Raises:
        ImportRefused: naming the tensors.
    """
    missing = [name for name in plan.conversions if name not in checkpoint.tensors]
    extra = [n for n in checkpoint.tensors if n not in plan.conversions and not plan.dropped(n)]
    if missing or extra:
        kinds = (("missing", missing), ("not known", extra))
        said = "; ".join(f"{len(names)} {kind}: {_some(names)}" for kind, names in kinds if names)
        raise ImportRefused(f"{checkpoint.path}: wrong tensors; {said}")
    for name, conversion in plan.conversions.items():
        info = checkpoint.tensors[name]
        if info.shape not in conversion.shapes:
            allowed = " or ".join(str(list(shape)) for shape in conversion.shapes)
            raise ImportRefused(f"{info.file}: tensor {name!r} has shape {list(info.shape)}; {allowed} needed")
        if info.dtype not in FLOATS.values():
            raise ImportRefused(f"{info.file}: tensor {name!r} has dtype {info.dtype}; {', '.join(FLOATS)} needed")


def write(checkpoint: Checkpoint, plan: Plan, output: Path, report: Report = print, limit: int = SHARD_BYTES) -> None:
    """Verify, convert and write ``output``, which appears whole or not at all.

    Raises:
        ImportRefused: a wrong checkpoint, or ``output`` exists.
    """
    verify(checkpoint, plan)
    shards = _shards(checkpoint, plan, limit)
    with _fresh_folder(output) as folder:
        weight_map: dict[str, str] = {}
        for number, names in enumerate(shards, start=1):
            single = len(shards) == 1
            file = "model.safetensors" if single else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            tensors = dict(_converted(checkpoint, plan, names))
            save_file(tensors, folder / file, metadata={"format": "pt"})
            (folder / file).chmod(0o644)
            weight_map |= dict.fromkeys(tensors, file)
            report(f"wrote {file}: {len(tensors)} tensors ({number} of {len(shards)})")
            del tensors
        if len(shards) > 1:
            total = sum(_target_bytes(checkpoint.tensors[name], c) for name, c in plan.conversions.items())
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            _write_json(folder / "model.safetensors.index.json", index)
        _write_json(folder / "config.json", plan.config)
        for name, source in plan.copies.items():
            shutil.copyfile(source, folder / name)
        (folder / "README.md").write_text(_card(checkpoint, plan))


def check(checkpoint: Checkpoint, plan: Plan, output: Path | None) -> None:
    """Verify and convert without writing; with ``output``, compare every tensor, the config and the copies with it.

    Raises:
        ImportRefused: a wrong checkpoint, or the first difference.
    """
    verify(checkpoint, plan)
    ours = None if output is None else Checkpoint.open(output)
    if ours is not None and output is not None:
        _check_files(ours, plan, output)
    names = [name for shard in _shards(checkpoint, plan, SHARD_BYTES) for name in shard]
    for target, tensor in _converted(checkpoint, plan, names):
        if ours is None:
            continue
        _, written = next(ours.values([target]))
        if written.dtype != tensor.dtype or written.shape != tensor.shape or not torch.equal(written, tensor):
            raise ImportRefused(f"{ours.tensors[target].file}: tensor {target!r} is not what the source gives")


def _check_files(ours: Checkpoint, plan: Plan, output: Path) -> None:
    expected = Plan(
        {c.target: Conversion(c.target, (c.shape,), c.shape) for c in plan.conversions.values()},
        lambda _: False,
        plan.config,
        plan.notes,
    )
    verify(ours, expected)
    if read_json(output / "config.json") != json.loads(json.dumps(dict(plan.config))):
        raise ImportRefused(f"{output / 'config.json'} is not what the source gives")
    for name, source in plan.copies.items():
        if not (output / name).is_file() or (output / name).read_bytes() != source.read_bytes():
            raise ImportRefused(f"{output / name} is not the file {source}")


def _converted(checkpoint: Checkpoint, plan: Plan, names: list[str]) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in checkpoint.values(names):
        conversion = plan.conversions[name]
        converted = conversion.apply(tensor)
        if converted.shape != conversion.shape:
            raise ImportRefused(f"{checkpoint.path}: tensor {name!r} changed while it was read")
        yield conversion.target, converted
        del converted  # before the next one is read


def _shards(checkpoint: Checkpoint, plan: Plan, limit: int) -> list[list[str]]:
    """Names of the source in the order of its files, cut so that no shard exceeds ``limit`` bytes (or one tensor)."""
    order = {file: number for number, file in enumerate(checkpoint.files)}
    names = sorted(plan.conversions, key=lambda name: order[checkpoint.tensors[name].file])
    shards: list[list[str]] = []
    filled = limit + 1
    for name in names:
        size = _target_bytes(checkpoint.tensors[name], plan.conversions[name])
        if filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def _target_bytes(info: TensorInfo, conversion: Conversion) -> int:
    return torch.Size(conversion.shape).numel() * (conversion.dtype or info.dtype).itemsize


@contextmanager
def _fresh_folder(output: Path) -> Iterator[Path]:
    """A hidden sibling that becomes ``output`` on success and is removed otherwise."""
    if output.exists():
        raise ImportRefused(f"{output} exists already; give another OUTPUT, or remove it")
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(f".{output.name}.partial-{os.getpid()}")
    partial.mkdir()
    try:
        yield partial
        partial.rename(output)
    except BaseException:
        shutil.rmtree(partial)
        raise


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(dict(value), indent=2, sort_keys=True) + "\n")


def _card(checkpoint: Checkpoint, plan: Plan) -> str:
    dropped = [name for name in checkpoint.tensors if name not in plan.conversions]
    lines = [
        "# Imported weights",
        "",
        f"{plan.config['architectures'][0]}, {plan.parameters:,} values in {len(plan.conversions)} tensors. Written by",
        "`rl-system import-weights` (docs/import-weights.md). The licence of the source applies.",
        "",
        "## Source",
        "",
        f"`{checkpoint.path.name}`: {len(checkpoint.tensors)} tensors, {len(dropped)} of them dropped.",
        "",
        "| file | bytes | sha256 |",
        "|---|---|---|",
        *(f"| {file.name} | {file.stat().st_size:,} | `{sha256(file)}` |" for file in checkpoint.files),
        "",
        "## What was changed",
        "",
        *(f"- {note}" for note in plan.notes),
    ]
    return "\n".join(lines) + "\n"


def _some(names: list[str], most: int = 3) -> str:
    return ", ".join(repr(name) for name in names[:most]) + (", ..." if len(names) > most else "")
