"""Groups that have their rewards and are in no checkpoint yet, on disk: a resumed run does not make them again."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path

from rl_system.runs.files import write_atomic
from rl_system.runs.group_file import GroupFile, UnreadableGroupError, group_bytes
from vlcot.groups import Prompt, ScoredGroup

LOG = logging.getLogger(__name__)


class ReadyGroups:
    """One file for each group, ``ORDER.group``, from the moment it has its rewards until a checkpoint has its step.

    Files that a resumed run cannot use are deleted before it makes weights of its own: those of groups that its
    checkpoint accounts for, and those with tokens of later weights, which the run that goes on never had (its own
    weights of that version are others).

    Args:
        directory: made if missing. Only the process that holds the run's lock writes to it.
        admitted: groups that the checkpoint accounts for.
        version: of the checkpoint's weights.
        writer: carries out writes and deletions, in order; default a thread.
    """

    def __init__(self, directory: Path, admitted: int, version: int, writer: Executor | None = None) -> None:
        self._directory = directory
        self._accounted = admitted
        self._writer = writer or ThreadPoolExecutor(max_workers=1, thread_name_prefix="ready-groups")
        self._reused: set[str] = set()
        """Ids of the groups that were taken."""
        self.refused: Counter[str] = Counter()
        """Stored groups that could not be used, by reason: ``lost_weights``, ``unreadable``, ``other_prompt``,
        ``too_old``."""
        directory.mkdir(exist_ok=True)
        self._stored = self._usable(version)

    def _usable(self, version: int) -> dict[int, GroupFile]:
        stored = {}
        for path in self._directory.iterdir():
            order = int(path.stem) if path.suffix == ".group" and path.stem.isdecimal() else -1
            file = self._open(path) if order >= self._accounted else None
            if file is not None and file.newest > version:
                self.refused["lost_weights"] += 1
                file = None
            if file is None:
                path.unlink()  # the half files of a killed writer too
            else:
                stored[order] = file
        return stored

    def _open(self, path: Path) -> GroupFile | None:
        try:
            return GroupFile(path)
        except UnreadableGroupError as error:
            self._refuse("unreadable", error)
            return None

    def _refuse(self, reason: str, error: object) -> None:
        self.refused[reason] += 1
        LOG.warning("a stored group is generated again, %s: %s", reason, error)

    def take(self, order: int, prompt: Prompt, oldest: int) -> ScoredGroup | None:
        """The stored group of this admission, None if there is none that can be used. Its file stays.

        Args:
            oldest: version before which none of its tokens may have been sampled.
        """
        file = self._stored.pop(order, None)
        if file is None:
            return None
        if not file.is_of(prompt):
            self._refuse("other_prompt", f"group {order} is not of {prompt.row_id} as it is now")
        elif file.oldest < oldest:
            self.refused["too_old"] += 1
        else:
            try:
                scored = file.read(prompt)
            except UnreadableGroupError as error:
                self._refuse("unreadable", error)
            else:
                self._reused.add(prompt.group_id)
                return scored
        self._writer.submit(self._path(order).unlink, missing_ok=True)
        return None

    def keep(self, order: int, scored: ScoredGroup) -> None:
        """Store a group that has its rewards; returns at once. A group that cannot be stored is logged."""
        self._writer.submit(self._write, order, scored)

    def _write(self, order: int, scored: ScoredGroup) -> None:
        if order < self._accounted:
            return  # a checkpoint was faster
        try:
            write_atomic(self._path(order), group_bytes(scored))
        except (OSError, TypeError, ValueError) as error:
            LOG.warning("group %d is not stored; after a stop it would be generated again: %s", order, error)

    def forget(self, admitted: int) -> None:
        """A checkpoint accounts for the first ``admitted`` groups; returns at once."""
        before, self._accounted = self._accounted, max(self._accounted, admitted)
        for order in range(before, admitted):
            self._writer.submit(self._path(order).unlink, missing_ok=True)

    def metrics(self, groups: Sequence[ScoredGroup]) -> dict[str, float]:
        """``groups/reused``: those of a step that an earlier attempt made; ``groups/refused_REASON``: stored ones that
        could not be used, since the last call."""
        reused = sum(scored.group.prompt.group_id in self._reused for scored in groups)
        refused = {f"groups/refused_{reason}": float(count) for reason, count in self.refused.items()}
        self.refused.clear()
        return {"groups/reused": float(reused), **refused}

    def close(self) -> None:
        """Wait for what is being written."""
        self._writer.shutdown()

    def _path(self, order: int) -> Path:
        return self._directory / f"{order:08d}.group"
