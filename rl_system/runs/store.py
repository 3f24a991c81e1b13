"""A run that is kept in an object store, or in any other file system that pyarrow opens by URI."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyarrow import fs

from rl_system.config.uris import below

CHECKPOINTS = "checkpoints"
ELSEWHERE = (CHECKPOINTS, "start")
"""Folders of a run that are no small files: the learner writes its checkpoints straight to the store, and the random
start of a cold start is made again from its seed."""
CLAIM = "claim.json"
PROBE = "claim.probe"
_OWN = (CLAIM, PROBE)
_WHOLE = ("s3", "gcs", "abfs")
"""File systems that show an object only once it is whole."""


class StoreError(RuntimeError):
    """The store has failed for too long, or the run was taken over: nothing more is written to it."""


@dataclass(frozen=True)
class StoredRun:
    """``OUTPUT_DIR/NAME`` in a store.

    Attributes:
        files: the file system.
        path: of the run on it.
        uri: of the run, as people name it.
    """

    files: fs.FileSystem
    path: str
    uri: str

    @classmethod
    def at(cls, uri: str) -> StoredRun:
        """The run with this URI, which need not exist.

        Raises:
            ValueError: pyarrow takes no such URI, or the store cannot be reached; one line says why.
        """
        with reaching(uri):
            files, path = fs.FileSystem.from_uri(uri)
            bucket, _, rest = path.partition("/")
            if bucket and not rest:
                raise ValueError(f"{uri} names no folder in {bucket}")
            if bucket and files.get_file_info(bucket).type == fs.FileType.NotFound:
                raise ValueError(f"{uri} cannot be used: there is no {bucket}")
            files.get_file_info(path)
        return cls(files, path, uri)

    def named(self, name: str) -> str:
        """URI of a file of the run."""
        return below(self.uri, name)

    @property
    def place(self) -> str:
        """What people call it."""
        return self.uri

    def status(self) -> dict[str, Any]:
        """Content of ``status.json``; empty if there is none."""
        with reaching(self.uri):
            text = self.read("status.json")
        return {} if text is None else dict(json.loads(text))

    def list(self) -> dict[str, fs.FileInfo]:
        """The small files of the run by their path inside it."""
        selector = fs.FileSelector(self.path, allow_not_found=True, recursive=True)
        start = len(self.path.rstrip("/")) + 1
        found = {info.path[start:]: info for info in self.files.get_file_info(selector) if info.is_file}
        return {name: info for name, info in found.items() if name.split("/")[0] not in ELSEWHERE and _shown(name)}

    def has_checkpoints(self) -> bool:
        """Whether a learner has written to the run."""
        selector = fs.FileSelector(f"{self.path}/{CHECKPOINTS}", allow_not_found=True, recursive=True)
        return any(info.is_file for info in self.files.get_file_info(selector))

    def read(self, name: str) -> bytes | None:
        """Content of a file; None if there is none."""
        try:
            with self.files.open_input_stream(f"{self.path}/{name}") as stream:
                return bytes(stream.read())
        except FileNotFoundError:
            return None

    def write(self, name: str, data: bytes) -> None:
        """Replace a file; a reader sees the old content or the new."""
        target = f"{self.path}/{name}"
        if _kind(self.files) in _WHOLE:
            self._put(target, data)
        else:
            folder, _, last = target.rpartition("/")
            self._put(f"{folder}/.{last}.part", data)
            self.files.move(f"{folder}/.{last}.part", target)

    def _put(self, target: str, data: bytes) -> None:
        try:
            stream = self.files.open_output_stream(target)
        except FileNotFoundError:  # a file system with real folders
            self.files.create_dir(target.rpartition("/")[0], recursive=True)
            stream = self.files.open_output_stream(target)
        with stream:
            stream.write(data)

    def delete(self, name: str) -> None:
        """Remove a file if it is there."""
        with suppress(FileNotFoundError):
            self.files.delete_file(f"{self.path}/{name}")

    def fetch(self, folder: Path, wanted: Callable[[str], bool] = lambda name: True) -> None:
        """Copy the small files, or those whose name is ``wanted``, into ``folder``, made if missing."""
        for name in filter(wanted, self.list()):
            self._copy(name, folder / name)

    def fetch_folder(self, name: str, folder: Path) -> None:
        """Copy the folder ``name`` of the run, whatever its size, to ``folder``. FileNotFoundError if it is missing."""
        folder.mkdir(parents=True, exist_ok=True)
        fs.copy_files(f"{self.path}/{name}", str(folder), source_filesystem=self.files)

    def _copy(self, name: str, target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        data = self.read(name)
        if data is not None:  # else it was deleted since it was listed
            target.write_bytes(data)


@contextmanager
def reaching(uri: str) -> Iterator[None]:
    """Turn what a store answers into one ValueError that names ``uri``."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"{uri} cannot be used: {_first_line(error)}") from None
    except ValueError as error:  # pyarrow's errors about a URI are ValueErrors
        text = _first_line(error)
        raise ValueError(text if uri in text else f"{uri} cannot be used: {text}") from None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _shown(name: str) -> bool:
    return name not in _OWN and not any(part.startswith(".") for part in name.split("/"))


def _kind(files: fs.FileSystem) -> str:
    return str(_kind(files.base_fs) if isinstance(files, fs.SubTreeFileSystem) else files.type_name)
