"""What every process did when."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from rl_system.runs.files import JsonLines, read_json_lines


@dataclass(frozen=True)
class TimelineEvent:
    """``process`` did ``name`` from ``start_s`` to ``end_s`` (epoch seconds)."""

    process: str
    name: str
    start_s: float
    end_s: float

    def __post_init__(self) -> None:
        if not self.start_s <= self.end_s:
            raise ValueError(f"{self.process} {self.name}: ends at {self.end_s} before it starts at {self.start_s}")


class TimelineWriter:
    """Appends events to a file, one per line."""

    def __init__(self, path: Path) -> None:
        self._lines = JsonLines(path)

    def write(self, event: TimelineEvent) -> None:
        """Append ``event``."""
        self._lines.append(asdict(event))

    def close(self) -> None:
        """Close the file."""
        self._lines.close()


def read_timeline(path: Path) -> list[TimelineEvent]:
    """All events, by start; a half line is skipped with a warning."""
    return sorted((TimelineEvent(**record) for record in read_json_lines(path)), key=lambda event: event.start_s)
