"""What keeps a run while one attempt works on it: a lock on its folder, or its place in a store."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Protocol

from rl_system.config.uris import absolute, below, is_uri
from rl_system.runs.claim import Claim
from rl_system.runs.directory import RunDirectory, check_name, check_unchanged
from rl_system.runs.mirror import Mirror
from rl_system.runs.store import StoredRun, StoreError, reaching

CONFIG = "config.yaml"


class Keeper(Protocol):
    """Holds the claim of an attempt on its run."""

    @property
    def error(self) -> Exception | None:
        """Why the run cannot go on; None while it can."""

    def flush(self) -> None:
        """Return once all that was written so far is where a later attempt finds it. StoreError if it cannot be."""

    def close(self) -> None:
        """The same, and give the run free."""


class OnDisk:
    """A run on a disk: files are where they belong, and a lock is the claim."""

    error = None

    def __init__(self, lock: IO[str]) -> None:
        self._lock = lock

    def flush(self) -> None:
        """Nothing is pending."""

    def close(self) -> None:
        """Release the lock."""
        self._lock.close()


def find(output_dir: str, name: str, config_yaml: str) -> RunDirectory | StoredRun | None:
    """The run of this name, to go on with; None if there is none.

    Raises:
        ValueError: it is none, it was made with other settings that matter, or its store cannot be used.
    """
    if not is_uri(output_dir):
        return RunDirectory.resume(output_dir, name, config_yaml)
    check_name(name)
    stored = StoredRun.at(below(output_dir, name))
    with reaching(stored.uri):
        config = stored.read(CONFIG)
        if config is None:
            return None
    check_unchanged(stored.uri, config.decode(), config_yaml)
    return stored


@contextmanager
def readable(place: str, wanted: Callable[[str], bool]) -> Iterator[tuple[RunDirectory, Callable[[], None]]]:
    """A run to look at, and a function that brings it up to date: a folder, or a copy of what is in a store.

    Args:
        place: path or URI of the run.
        wanted: files that are copied, by their name in the run.

    Raises:
        ValueError: it is no run, or its store cannot be used.
    """
    if not is_uri(place):
        yield RunDirectory.open(place), lambda: None
        return
    stored = StoredRun.at(absolute(place))

    def fetch() -> None:
        with reaching(place):
            stored.fetch(copy, wanted)

    with tempfile.TemporaryDirectory(prefix="rl-system-") as folder:
        copy = Path(folder) / stored.path.rpartition("/")[2]
        fetch()
        if not (copy / CONFIG).exists():
            raise ValueError(f"{place} is not a run: it has no {CONFIG}")
        yield RunDirectory(copy, stored), fetch


def claim_new(
    output_dir: str, name: str, config_yaml: str, overwrite: bool, scratch: str | None
) -> tuple[RunDirectory, Keeper]:
    """Make a run, in state ``running``.

    Raises:
        ValueError: of :meth:`RunDirectory.create`; or the store cannot be used, or has such a run.
    """
    if not is_uri(output_dir):
        run = RunDirectory.create(output_dir, name, config_yaml, overwrite)
        return run, OnDisk(run.lock())
    check_name(name)
    stored = StoredRun.at(below(output_dir, name))
    return _claim(stored, scratch, config_yaml)


def claim_existing(existing: RunDirectory | StoredRun, scratch: str | None) -> tuple[RunDirectory, Keeper]:
    """Take the run for this attempt; the state is ``running`` then.

    Raises:
        ValueError: another attempt has it, or the store cannot be used.
    """
    if isinstance(existing, StoredRun):
        return _claim(existing, scratch, None)
    lock = existing.lock()
    existing.set_status("running")
    return existing, OnDisk(lock)


def _claim(stored: StoredRun, scratch: str | None, config_yaml: str | None) -> tuple[RunDirectory, Mirror]:
    """Claim the run and make its working copy: of a new run, with ``config_yaml``, or of what is there."""
    claim = Claim.take(stored)
    copies: Path | None = None
    try:
        copies = _scratch(scratch)
        with reaching(stored.uri):
            if config_yaml is not None and (stored.list() or stored.has_checkpoints()):
                raise ValueError(
                    f"{stored.uri} exists already: choose another run name, or remove it; "
                    "overwrite=true moves nothing aside in a store"
                )
            name = stored.path.rpartition("/")[2]
            if config_yaml is None:
                stored.fetch(copies / name)
                run = RunDirectory(copies / name, stored)
                run.make_folders()
            else:
                run = RunDirectory(RunDirectory.create(copies, name, config_yaml).path, stored)
            mirror = Mirror(stored, run.path, claim, known=config_yaml is None, made=copies)
            run.set_status("running")
            mirror.flush()
    except BaseException as error:
        if copies is not None:
            shutil.rmtree(copies)
        with suppress(OSError):  # it will be stale
            claim.release()
        if isinstance(error, StoreError):
            raise ValueError(str(error)) from None
        raise
    mirror.start()
    return run, mirror


def _scratch(folder: str | None) -> Path:
    try:
        if folder is not None:
            Path(folder).mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix="rl-system-", dir=folder))
    except OSError as error:
        raise ValueError(f"scratch_dir={folder} cannot be used: {error}") from None
