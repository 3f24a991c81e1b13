"""A prepared folder (``rl-system prepare-data``) as training code reads it. Needs no Ray.

manifest.json        what the folder holds, with a checksum of every shard; written last
config.yaml          the settings it was made with
schema.json          the columns, in words
plan.json            which image belongs to which shard
shards/*.parquet     the rows
card.html, card.json the data card
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

FORMAT = 1
MANIFEST, SHARDS = "manifest.json", "shards"

_COLUMNS: tuple[tuple[str, pa.DataType, str], ...] = (
    ("row_id", pa.int64(), "unique in the folder; stays when images are added"),
    ("prompt_ids", pa.list_(pa.int32()), "token ids of the question with the LR image, turn end included"),
    ("answer_ids", pa.list_(pa.int32()), "token ids of the VLCoT, turn end included"),
    ("prompt_tokens", pa.int32(), "length of prompt_ids, for packing"),
    ("answer_tokens", pa.int32(), "length of answer_ids, for packing"),
    ("image", pa.string(), "path of the photograph below the input folder"),
    ("image_sha256", pa.string(), "of the photograph's file"),
    ("draw", pa.int32(), "number of the sample of this photograph, from 0"),
    ("top", pa.int32(), "first row of the crop in the photograph (padded if it is smaller than the crop)"),
    ("left", pa.int32(), "first column of the crop"),
    ("flip", pa.bool_(), "whether the photograph was mirrored before the crop"),
    ("target", pa.binary(), "PNG, RGB: the final image"),
    ("lr", pa.binary(), "PNG, RGB: the degraded image, a quarter of the side"),
    ("degradation", pa.string(), "the degradation in words"),
    ("record", pa.string(), "JSON: every parameter of the degradation; with the target it gives the LR image again"),
    ("coarse", pa.string(), "coarse description"),
    ("middle", pa.string(), "middle description"),
    ("fine", pa.string(), "fine description"),
    ("objects", pa.list_(pa.string()), "names of the main objects; null where they were not asked for"),
    ("lr_codes", pa.list_(pa.int32()), "VQ codes of the LR image at full size, row by row"),
    ("coarse_codes", pa.list_(pa.int32()), "VQ codes at 1/4 of the side, row by row; empty without such a block"),
    ("middle_codes", pa.list_(pa.int32()), "VQ codes at 1/2 of the side; empty without such a block"),
    ("final_codes", pa.list_(pa.int32()), "VQ codes at the full side"),
)
SCHEMA = pa.schema([pa.field(name, kind, nullable=name == "objects") for name, kind, _ in _COLUMNS])
_IDS = ("row_id", "prompt_ids", "answer_ids")


def schema_description() -> list[dict[str, str]]:
    """Name, type and meaning of every column, for ``schema.json``."""
    return [{"name": name, "type": str(kind), "meaning": meaning} for name, kind, meaning in _COLUMNS]


@dataclass(frozen=True, eq=False)
class PreparedExample:
    """One example of the cold start.

    Attributes:
        row_id: unique in the folder.
        prompt_ids: int32 [P], no loss on them.
        answer_ids: int32 [A], the VLCoT ending with the turn end.
    """

    row_id: int
    prompt_ids: np.ndarray
    answer_ids: np.ndarray


class PreparedData:
    """Random access to a prepared folder, in the order of the shards.

    Args:
        path: the folder.

    Raises:
        ValueError: no such folder, preparation has not ended, or a shard is missing or has other columns.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.manifest = read_manifest(self.path)
        self._files = [self.path / shard["file"] for shard in self.manifest["shards"]]
        for file, shard in zip(self._files, self.manifest["shards"], strict=True):
            _check_shard(file, shard["rows"])
        self._ends = list(accumulate(shard["rows"] for shard in self.manifest["shards"]))
        # A shard of 256 examples at 512 pixels holds 10 MB of ids.
        self._table = lru_cache(maxsize=8)(self._read)

    def __len__(self) -> int:
        """Number of examples."""
        return self._ends[-1] if self._ends else 0

    def example(self, index: int) -> PreparedExample:
        """Example ``index`` in 0..len-1. IndexError beyond."""
        row = self._row(index, _IDS)
        return PreparedExample(
            row["row_id"].as_py(), _array(row["prompt_ids"], np.int32), _array(row["answer_ids"], np.int32)
        )

    def lengths(self) -> np.ndarray:
        """int64 [len, 2]: tokens of the prompt and of the answer of every example; reads nothing else."""
        columns = [pq.read_table(f, columns=["prompt_tokens", "answer_tokens"]) for f in self._files]
        if not columns:
            return np.zeros((0, 2), dtype=np.int64)
        table = pa.concat_tables(columns)
        return np.stack([table[name].to_numpy().astype(np.int64) for name in table.column_names], axis=1)

    def row(self, index: int) -> dict[str, Any]:
        """Every column of row ``index`` as Python values. IndexError beyond the end."""
        return {name: value.as_py() for name, value in self._row(index, tuple(SCHEMA.names)).items()}

    def column(self, name: str) -> list[Any]:
        """One column of all rows as Python values."""
        return [value for file in self._files for value in pq.read_table(file, columns=[name])[name].to_pylist()]

    def verify(self) -> None:
        """Compare every shard with its checksum.

        Raises:
            ValueError: naming the first that differs.
        """
        for file, shard in zip(self._files, self.manifest["shards"], strict=True):
            if sha256_of(file) != shard["sha256"]:
                raise ValueError(f"{file} is not the file of the manifest: its checksum differs")

    def _row(self, index: int, columns: tuple[str, ...]) -> dict[str, pa.Scalar]:
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        shard = bisect_right(self._ends, index)
        table = self._table(shard, columns)
        place = index - (self._ends[shard] - table.num_rows)
        return {name: table[name][place] for name in columns}

    def _read(self, shard: int, columns: tuple[str, ...]) -> pa.Table:
        return pq.read_table(self._files[shard], columns=list(columns))


def read_manifest(path: Path) -> dict[str, Any]:
    """``manifest.json`` of a prepared folder.

    Raises:
        ValueError: there is none, or it is of another format.
    """
    file = path / MANIFEST
    if not file.is_file():
        raise ValueError(f"{path} is no prepared folder, or its preparation has not ended: it has no {MANIFEST}")
    manifest: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    if manifest.get("format") != FORMAT:
        raise ValueError(f"{file} is of format {manifest.get('format')}, this program reads format {FORMAT}")
    return manifest


def sha256_of(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_shard(file: Path, rows: int) -> None:
    try:
        found = pq.ParquetFile(file)
    except (OSError, pa.ArrowInvalid) as error:
        raise ValueError(f"cannot read the shard {file}: {error}") from error
    with found:
        if not found.schema_arrow.remove_metadata().equals(SCHEMA):
            raise ValueError(f"{file} has other columns than this program writes (see schema.json beside the shards)")
        if found.metadata.num_rows != rows:
            raise ValueError(f"{file} has {found.metadata.num_rows} rows, the manifest says {rows}")


def _array(value: pa.Scalar, dtype: type) -> np.ndarray:
    return value.values.to_numpy(zero_copy_only=False).astype(dtype)
