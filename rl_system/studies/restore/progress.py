"""How far a batch is, on one line of a terminal, or a line now and then elsewhere."""

from __future__ import annotations

import sys
import time

EVERY_S = 15.0
"""Seconds between lines where there is no terminal."""


class Progress:
    """Counts tiles and tokens; the clock starts when the sampler does.

    Args:
        tiles: of all pictures whose size is known.
    """

    def __init__(self, tiles: int) -> None:
        self._left = tiles
        self._done = 0
        self._terminal = sys.stderr.isatty()
        self._start: float | None = None
        self._end = 0.0
        self._said = 0.0
        self._shown = False
        self.tokens = 0

    def started(self) -> None:
        """The sampler is there; further calls change nothing."""
        if self._start is None:
            self._start = self._end = self._said = time.monotonic()

    def wrote(self, tokens: int) -> None:
        """So many tokens more."""
        self.tokens += tokens
        self._end = time.monotonic()
        self._show()

    def drew(self, tiles: int = 1) -> None:
        """So many tiles more are in place."""
        self._done += tiles
        self._left -= tiles

    def dropped(self, tiles: int) -> None:
        """So many tiles will not be drawn: their picture is skipped, or failed."""
        self._left -= tiles

    def say(self, line: str) -> None:
        """Print a line of its own."""
        if self._shown:
            print(file=sys.stderr)
            self._shown = False
        print(line, file=sys.stderr, flush=True)

    @property
    def seconds(self) -> float:
        """From the start of the sampler to its last answer."""
        return 0.0 if self._start is None else self._end - self._start

    @property
    def rate(self) -> float:
        """Tokens a second."""
        return self.tokens / self.seconds if self.seconds > 0 else 0.0

    def line(self) -> str:
        """``tiles 40/121  1,234 tokens/s  ETA 0:12``."""
        text = f"tiles {self._done}/{self._done + self._left}  {self.rate:,.0f} tokens/s"
        if self._done and self._left > 0:
            minutes, seconds = divmod(round(self.seconds / self._done * self._left), 60)
            text += f"  ETA {minutes}:{seconds:02d}"
        return text

    def _show(self) -> None:
        if self._terminal:
            print(f"\r{self.line():<60}", end="", file=sys.stderr, flush=True)
            self._shown = True
        elif self._end - self._said >= EVERY_S:
            self._said = self._end
            print(self.line(), file=sys.stderr, flush=True)
