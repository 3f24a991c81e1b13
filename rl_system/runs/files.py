"""Files that are whole at any moment: replaced in one move, or appended to line by line."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

LOG = logging.getLogger(__name__)


def write_atomic(path: Path, data: str | bytes) -> None:
    """Write ``path`` (text as UTF-8) so that a reader sees the old content or the new, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, record: Any) -> None:
    """Write ``record`` as indented JSON, atomically. ValueError if it holds NaN or an infinity."""
    write_atomic(path, json.dumps(record, indent=2, allow_nan=False, ensure_ascii=False) + "\n")


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to write into that becomes ``path``, which must not exist, when all is written.

    Raises:
        OSError: it cannot be written; nothing is left behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        partial.mkdir()
        yield partial
        partial.rename(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


class JsonLines:
    """Appends one JSON object per line. A half line left by a killed writer is closed first."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("ab+")
        if self._file.tell():
            self._file.seek(-1, os.SEEK_END)
            if self._file.read(1) != b"\n":
                self._file.write(b"\n")

    def append(self, record: Mapping[str, Any]) -> None:
        """Write and flush one line. ValueError if it holds NaN or an infinity."""
        self._file.write(json.dumps(record, allow_nan=False).encode() + b"\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def cut_json_lines(path: Path, keep: Callable[[dict[str, Any]], bool]) -> None:
    """Drop the lines of a file whose object ``keep`` refuses, and incomplete ones; no file stays none."""
    if path.exists():
        kept = [json.dumps(record) for record in read_json_lines(path) if keep(record)]
        write_atomic(path, "".join(f"{line}\n" for line in kept))


def read_json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a file that a writer may still append to or was killed at; none if it does not exist.

    A line that is no JSON object is skipped with a logged warning that names it.
    """
    if not path.exists():
        return
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if isinstance(record, dict):
            yield record
        else:
            LOG.warning("%s: line %d is incomplete and was skipped", path, number)
