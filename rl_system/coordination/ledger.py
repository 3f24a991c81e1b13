"""The life of every group: slots that bound staleness, and exactly-once accounting of data rows.

Let ``s`` be ``max_staleness`` and ``g`` groups per step. There are ``(s + 1) * g`` slots. A group takes one
when it is admitted and holds it until its training step has been pushed to the actors, or until it is
dropped. Batches are formed strictly in order of admission. At admission at most ``(s + 1) * g - 1`` live
groups stand ahead, each training step takes ``g`` of them, so at most ``s`` steps happen between a group's
admission and its own training step: no token is trained that is more than ``s`` versions old.

A resumed run may have groups that an earlier attempt made. One of them takes its slot as any other does, at its own
place in the order of admission, but its tokens are older than its admission: it is used only if they are no more than
``s`` versions older than :meth:`Ledger.trained_at`, which drops of groups ahead can only lower.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum


class GroupState(StrEnum):
    """Where a group stands."""

    ADMITTED = "admitted"
    GENERATING = "generating"
    SCORING = "scoring"
    READY = "ready"
    TRAINED = "trained"
    DROPPED = "dropped"


_NEXT = {
    GroupState.ADMITTED: {GroupState.GENERATING, GroupState.READY, GroupState.DROPPED},
    GroupState.GENERATING: {GroupState.SCORING, GroupState.DROPPED},
    GroupState.SCORING: {GroupState.READY, GroupState.DROPPED},
    GroupState.READY: {GroupState.TRAINED},
    GroupState.TRAINED: set(),
    GroupState.DROPPED: set(),
}


LIVE = (GroupState.ADMITTED, GroupState.GENERATING, GroupState.SCORING, GroupState.READY)
"""States of a group that holds a slot."""


@dataclass
class LedgerEntry:
    """One admitted group. ``since`` is the clock time of the last change of state, in seconds."""

    order: int
    row_id: str
    state: GroupState
    since: float
    reason: str = ""


@dataclass(frozen=True)
class BatchRecord:
    """What one step was given: enough to go on after a crash with neither a row lost nor one trained twice.

    Batches are formed in order of admission, so every group that was admitted before the last one of a batch is in
    this batch, in an earlier one, or dropped.

    Attributes:
        step: 1, 2, ...
        rows: trained row ids by order of admission.
        dropped: row ids and reasons of the groups before the last of this batch that no record has named yet, by
            order of admission.
    """

    step: int
    rows: Mapping[int, str]
    dropped: Mapping[int, tuple[str, str]] = field(default_factory=dict)

    @property
    def admitted(self) -> int:
        """Groups that this record and those before it account for."""
        return max(self.rows) + 1


class Ledger:
    """States of all groups of a run.

    Args:
        groups_per_step: groups that one learner step trains.
        max_staleness: bound on versions between sampling and training; 0 is synchronous GRPO.
        total_groups: groups to train in the whole run.
    """

    def __init__(self, groups_per_step: int, max_staleness: int, total_groups: int) -> None:
        self.groups_per_step = groups_per_step
        self.slots = (max_staleness + 1) * groups_per_step
        self.total_groups = total_groups
        self._entries: dict[int, LedgerEntry] = {}
        self._live: dict[int, LedgerEntry] = {}
        self._recorded = 0

    def may_admit(self) -> bool:
        """Whether a slot is free and another group is still needed."""
        trained = self.count(GroupState.TRAINED)
        return len(self._live) < self.slots and trained + len(self._live) < self.total_groups

    def admit(self, row_id: str, now: float) -> int:
        """Take a slot; returns the order of admission (0, 1, ...).

        Raises:
            RuntimeError: no slot is free.
        """
        if not self.may_admit():
            raise RuntimeError("no slot is free: a group must be trained or dropped first")
        order = len(self._entries)
        entry = LedgerEntry(order, row_id, GroupState.ADMITTED, now)
        self._entries[order] = self._live[order] = entry
        return order

    def move(self, order: int, state: GroupState, now: float, reason: str = "") -> None:
        """Change a group's state.

        Raises:
            RuntimeError: the change is not one that a group can make.
        """
        entry = self._entries[order]
        if state not in _NEXT[entry.state]:
            raise RuntimeError(f"group {order} cannot go from {entry.state} to {state}")
        entry.state, entry.since, entry.reason = state, now, reason
        if not _NEXT[state]:
            del self._live[order]

    def trained_at(self, order: int) -> int:
        """Version of the weights that this live group is trained on top of, if none of those ahead of it is dropped."""
        ahead = sum(live < order for live in self._live)
        return (self.count(GroupState.TRAINED) + ahead) // self.groups_per_step

    def next_batch(self) -> list[int] | None:
        """Orders of the next ``groups_per_step`` live groups, once all of them are ready."""
        head = sorted(self._live)[: self.groups_per_step]
        ready = len(head) == self.groups_per_step and all(self._live[o].state is GroupState.READY for o in head)
        return head if ready else None

    def record(self, step: int, batch: Sequence[int]) -> BatchRecord:
        """What is to be remembered of a batch before the learner gets it."""
        passed = [self._entries[order] for order in range(self._recorded, max(batch))]
        dropped = {e.order: (e.row_id, e.reason) for e in passed if e.state is GroupState.DROPPED}
        self._recorded = max(batch) + 1
        return BatchRecord(step, {order: self._entries[order].row_id for order in batch}, dropped)

    def restore(self, records: Sequence[BatchRecord], now: float) -> None:
        """Take the place of a ledger that has made these records, all of their steps trained; this one is new.

        Raises:
            ValueError: the records do not account for every admission up to the last of them, each once.
        """
        for record in records:
            ends = {order: (row, GroupState.TRAINED, "") for order, row in record.rows.items()}
            ends |= {order: (row, GroupState.DROPPED, reason) for order, (row, reason) in record.dropped.items()}
            for order in sorted(ends):
                if order != len(self._entries):
                    raise ValueError(f"step {record.step}: group {order} follows {len(self._entries)} others")
                row, state, reason = ends[order]
                self._entries[order] = LedgerEntry(order, row, state, now, reason)
        self._recorded = len(self._entries)

    def count(self, state: GroupState) -> int:
        """Groups in a state."""
        return self.counts()[state]

    def counts(self) -> Counter[GroupState]:
        """Groups by state."""
        return Counter(entry.state for entry in self._entries.values())

    def trained_rows(self) -> list[str]:
        """Row ids that were trained, in order of admission."""
        return [e.row_id for e in self._entries.values() if e.state is GroupState.TRAINED]

    def dropped_rows(self) -> dict[str, str]:
        """Row ids that were dropped, with the reason."""
        return {e.row_id: e.reason for e in self._entries.values() if e.state is GroupState.DROPPED}

    def waiting_for(self, now: float) -> str:
        """One line that names what every live group waits for."""
        parts = []
        for state in LIVE:
            since = [now - e.since for e in self._live.values() if e.state is state]
            if since:
                parts.append(f"{len(since)} {state} (oldest for {max(since):.0f} s)")
        return ", ".join(parts) or "no group is admitted"
