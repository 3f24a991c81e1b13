"""Which rows each step was given, written before the learner gets them: what a resumed run goes on behind."""

from __future__ import annotations

from pathlib import Path

from rl_system.coordination.ledger import BatchRecord
from rl_system.runs.files import JsonLines, cut_json_lines, read_json_lines


class Journal:
    """Appends the records of a run to a file, one line per step.

    Args:
        path: the file; what it holds of steps after ``done`` is dropped: they are made again.
        done: steps that the learner has done.
    """

    def __init__(self, path: Path, done: int) -> None:
        cut_json_lines(path, lambda line: line["step"] <= done)
        self._lines = JsonLines(path)

    def write(self, record: BatchRecord) -> None:
        """Append ``record``; it survives the death of this process."""
        self._lines.append({"step": record.step, "rows": dict(record.rows), "dropped": dict(record.dropped)})

    def close(self) -> None:
        """Close the file."""
        self._lines.close()


def read_journal(path: Path, done: int) -> list[BatchRecord]:
    """Records of the steps 1 to ``done``.

    Raises:
        ValueError: a step is missing; names it.
    """
    records = [
        BatchRecord(
            line["step"],
            {int(order): row for order, row in line["rows"].items()},
            {int(order): (row, reason) for order, (row, reason) in line["dropped"].items()},
        )
        for line in read_json_lines(path)
        if line["step"] <= done
    ]
    if [record.step for record in records] != list(range(1, done + 1)):
        known = ", ".join(str(record.step) for record in records) or "none"
        raise ValueError(f"{path}: the learner has done {done} steps, and this file has the rows of steps {known}")
    return records
