"""The directory of one run."""

from __future__ import annotations

import fcntl
import json
import os
import re
import time
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal

from rl_system.config.resume import changed_settings
from rl_system.runs.files import write_atomic, write_json

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem

    from rl_system.runs.store import StoredRun

State = Literal["running", "done", "interrupted", "stopped", "failed"]
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


class RunStopped(Exception):
    """The run was asked to stop; the learner has written a checkpoint of what it had done."""


@dataclass(frozen=True)
class RunDirectory:
    """``runs/NAME/``; every file in it is valid at any moment.

    Attributes:
        path: the folder.
        home: where the run is kept, if ``path`` is a working copy (:mod:`rl_system.runs.mirror`).
    """

    path: Path
    home: StoredRun | None = None

    @classmethod
    def create(cls, root: Path | str, name: str, config_yaml: str, overwrite: bool = False) -> RunDirectory:
        """Make the directory of a new run, in state ``running``.

        Args:
            root: directory of all runs; made if missing.
            config_yaml: the resolved configuration.
            overwrite: move an existing run of this name aside, to NAME.1, NAME.2, ...; nothing is deleted.

        Raises:
            ValueError: ``name`` is no plain name, or there is such a run already.
        """
        check_name(name)
        path = Path(root) / name
        if path.exists() and not overwrite:
            raise ValueError(f"{path} exists already: choose another run name, or overwrite=true to move it aside")
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            os.rename(path, _free_name(path))
        run = cls(path)
        path.mkdir()
        run.make_folders()
        write_atomic(run.config, config_yaml)
        run.set_status("running")
        return run

    @classmethod
    def open(cls, path: Path | str) -> RunDirectory:
        """An existing run. ValueError if ``path`` is none."""
        run = cls(Path(path))
        if not run.config.is_file():
            raise ValueError(f"{path} is not the directory of a run: it has no {run.config.name}")
        return run

    @classmethod
    def resume(cls, root: Path | str, name: str, config_yaml: str) -> RunDirectory | None:
        """The run of this name, to go on with, in the state that its last attempt left; None if there is none.

        Raises:
            ValueError: the path is no run, or the run was made with other settings that matter.
        """
        path = Path(root) / name
        if not path.exists():
            return None
        run = cls.open(path)
        check_unchanged(run.place, run.config.read_text(), config_yaml)
        return run

    def lock(self) -> IO[str]:
        """Claim the run for this process, until the answer is closed or the process ends.

        Raises:
            ValueError: another process writes to it.
        """
        claim = (self.path / "lock").open("a")
        try:
            fcntl.flock(claim, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            claim.close()
            raise ValueError(f"{self.path} is being written to by another process: wait for it, or end it") from None
        return claim

    @property
    def place(self) -> str:
        """What people call the run: its folder, or its URI."""
        return str(self.path) if self.home is None else self.home.place

    def named(self, name: str) -> str:
        """The same of a file in it."""
        return str(self.path / name) if self.home is None else self.home.named(name)

    @property
    def learner_storage(self) -> tuple[str, FileSystem | None]:
        """Where the learner writes its checkpoints: a path, and its file system if that is not the nodes' own."""
        if self.home is None:
            return str(self.checkpoints), None
        return f"{self.home.path}/{self.checkpoints.name}", self.home.files

    def local_policy(self, exported: Path) -> Path:
        """The policy that the learner has exported, on this machine."""
        if self.home is None:
            return exported
        name = exported.relative_to(self.home.path).as_posix()
        self.home.fetch_folder(name, self.path / name)
        return self.path / name

    def make_folders(self) -> None:
        """The folders that every run has."""
        for folder in (self.tensorboard, self.groups, self.checkpoints, self.logs):
            folder.mkdir(exist_ok=True)

    @property
    def name(self) -> str:
        """Name of the run."""
        return self.path.resolve().name

    @property
    def config(self) -> Path:
        """Resolved configuration."""
        return self.path / "config.yaml"

    @property
    def metrics(self) -> Path:
        """One line of metrics per step (:mod:`rl_system.runs.sinks`)."""
        return self.path / "metrics.jsonl"

    @property
    def journal(self) -> Path:
        """Rows of every step (:mod:`rl_system.runs.journal`)."""
        return self.path / "journal.jsonl"

    @property
    def timeline(self) -> Path:
        """What every process did when (:mod:`rl_system.runs.timeline`)."""
        return self.path / "timeline.jsonl"

    @property
    def live(self) -> Path:
        """What the run is doing now (:mod:`rl_system.runs.live`)."""
        return self.path / "live.json"

    @property
    def attempts(self) -> Path:
        """Who worked on the run, where (:mod:`rl_system.runs.attempt`)."""
        return self.path / "attempts.jsonl"

    @property
    def tensorboard(self) -> Path:
        """TensorBoard event files."""
        return self.path / "tensorboard"

    @property
    def groups(self) -> Path:
        """Best and worst groups (:mod:`rl_system.runs.groups`)."""
        return self.path / "groups"

    @property
    def ready(self) -> Path:
        """Groups that no checkpoint has yet (:mod:`rl_system.runs.ready`)."""
        return self.path / "ready"

    @property
    def checkpoints(self) -> Path:
        """Checkpoints of the learner."""
        return self.path / "checkpoints"

    @property
    def logs(self) -> Path:
        """Logs of the processes."""
        return self.path / "logs"

    @property
    def evaluation(self) -> Path:
        """Held-out results (:mod:`rl_system.runs.evaluation_files`)."""
        return self.path / "evaluation"

    @property
    def summary(self) -> Path:
        """Figures of the finished run (:mod:`rl_system.runs.summary`)."""
        return self.path / "summary.json"

    @property
    def report(self) -> Path:
        """The report (:mod:`rl_system.runs.report`)."""
        return self.path / "report.html"

    def set_status(self, state: State, reason: str = "") -> None:
        """Write ``status.json``: state, reason, and the epoch seconds of the start and of this change."""
        now = time.time()
        started = self.status().get("started_s", now)
        record = {"state": state, "reason": reason, "started_s": started, "changed_s": now}
        write_json(self.path / "status.json", record)

    def status(self) -> dict[str, Any]:
        """Content of ``status.json``; empty if there is none."""
        path = self.path / "status.json"
        status: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        return status


def check_name(name: str) -> None:
    """ValueError if ``name`` is no plain name."""
    if not _NAME.fullmatch(name):
        raise ValueError(f"run name {name!r} must consist of letters, digits, '_', '-', '.', and start with none of -.")


def check_unchanged(place: str, before: str, now: str) -> None:
    """ValueError if a run of the configuration ``before`` cannot go on with ``now``."""
    if changed := changed_settings(before, now):
        raise ValueError(f"{place} cannot go on with other settings: {'; '.join(changed)}")


def _free_name(path: Path) -> Path:
    return next(p for p in (path.with_name(f"{path.name}.{n}") for n in count(1)) if not p.exists())
