"""Keeps the files of a run, which are written to a working copy on this machine, in its store."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

from rl_system.runs.claim import Claim
from rl_system.runs.store import ELSEWHERE, StoredRun, StoreError

LOG = logging.getLogger(__name__)
EVERY_S = 5.0
"""Between two looks for changes."""
RENEW_S = 10.0
"""The claim is looked at before a write if that was done so long ago."""
GIVE_UP_S = 300.0
"""A store that fails for so long ends the run."""
_LAST = "status.json"
"""Says that a run is done: nothing of it arrives later."""


def interrupt() -> None:
    """End this process's main thread as Ctrl-C does."""
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)


class Mirror:
    """Uploads what changes in the working copy of a run, what was changed first, first; deletes what is deleted there.

    Args:
        stored: where the run is kept.
        folder: the working copy; what it holds is taken for unknown to the store unless ``known``.
        claim: looked at before anything is written.
        known: the working copy was just fetched.
        on_error: called once, in the background thread, when nothing more can be written.
        give_up_s: for how long a store may fail.
        made: the folder that was made for the working copy, removed with it; default the copy itself.
    """

    def __init__(
        self,
        stored: StoredRun,
        folder: Path,
        claim: Claim,
        known: bool = False,
        on_error: Callable[[], None] = interrupt,
        give_up_s: float = GIVE_UP_S,
        made: Path | None = None,
    ) -> None:
        self._made = made or folder
        self._stored = stored
        self._folder = folder
        self._claim = claim
        self._on_error = on_error
        self._give_up_s = give_up_s
        self._known = _files(folder) if known else {}
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._work, name="mirror", daemon=True)
        self.error: StoreError | None = None
        """Why nothing more is written."""

    def start(self) -> None:
        """Look for changes every few seconds from now on."""
        self._thread.start()

    def flush(self) -> None:
        """Return once every change made before the call is in the store.

        Raises:
            StoreError: the store has failed for too long, or another attempt has the run.
        """
        deadline, pause = time.monotonic() + self._give_up_s, 0.5
        while True:
            if self.error is not None:
                raise self.error
            try:
                with self._lock:
                    self._upload()
                return
            except StoreError as error:
                self.error = error
            except OSError as error:
                LOG.warning("%s: not written, tried again: %s", self._stored.uri, error)
                if time.monotonic() > deadline:
                    told = f"{self._stored.uri} could not be written to for {self._give_up_s:.0f} s: {error}"
                    self.error = StoreError(told)
                else:
                    time.sleep(pause)
                    pause = min(2 * pause, 15.0)

    def close(self) -> None:
        """Write the rest, give the run free, remove the working copy.

        Raises:
            StoreError: that could not be done; the working copy is still there.
        """
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join()
        self.flush()
        try:
            self._claim.release()
        except OSError as error:
            LOG.warning("%s: the claim stays until it is stale: %s", self._stored.uri, error)
        shutil.rmtree(self._made)

    def _work(self) -> None:
        try:
            while not self._closing.wait(EVERY_S):
                self.flush()
        except StoreError as error:
            LOG.error("%s", error)
            self._on_error()

    def _upload(self) -> None:
        """One pass. The claim is renewed first, and again if the pass takes long."""
        self._claim.renew()
        found = _files(self._folder)
        changed = [name for name, seen in found.items() if self._known.get(name) != seen]
        for name in sorted(changed, key=lambda name: (name == _LAST, found[name], name)):
            try:
                data = (self._folder / name).read_bytes()
            except FileNotFoundError:
                continue  # deleted meanwhile
            self._still_ours()
            self._stored.write(name, data)
            self._known[name] = found[name]
        for name in self._known.keys() - found.keys():
            self._still_ours()
            self._stored.delete(name)
            del self._known[name]

    def _still_ours(self) -> None:
        if time.monotonic() - self._claim.held_at > RENEW_S:
            self._claim.renew()


def _files(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Time of the last change, size and inode of each file that belongs into the store, by its path in ``folder``."""
    found = {}
    for parent, folders, names in os.walk(folder):
        here = Path(parent)
        top = here == folder
        folders[:] = [n for n in folders if _finished(n) and not (top and n in ELSEWHERE)]  # os.walk follows no links
        for name in filter(_finished, names):
            path = here / name
            try:
                seen = path.lstat()
            except FileNotFoundError:
                continue
            found[path.relative_to(folder).as_posix()] = (seen.st_mtime_ns, seen.st_size, seen.st_ino)
    return found


def _finished(name: str) -> bool:
    """Not one of the names under which files and folders are written before they are moved to their place."""
    return not name.startswith(".") and not name.endswith((".unfinished", ".tmp"))
