"""Standard output whose reader has gone (``rl-system ... | head``)."""

from __future__ import annotations

import io
import os
import signal
import sys
from typing import Any


class Output(io.FileIO):
    """The process's standard output. When nobody reads it any more, that counts as Ctrl-C, and the rest is not written.

    Not an exception where it is written: commands would take it for the failure of what they were doing, and report
    it. An interrupt ends each of them as it should, a run with its state and its processes; one that ignores it goes
    on in silence.
    """

    closed_by_reader = False

    def write(self, data: Any) -> int:
        """As of a file; everything is accepted once the reader has gone."""
        try:
            return super().write(data)
        except BrokenPipeError:
            self.closed_by_reader = True
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
            os.kill(os.getpid(), signal.SIGINT)
            return memoryview(data).nbytes


def replace_stdout() -> Output:
    """Put an :class:`Output` under ``sys.stdout``, which stays as it is otherwise."""
    old = sys.stdout
    old.flush()
    output = Output(old.fileno(), "w", closefd=False)
    raw: Any = output if getattr(old, "write_through", False) else io.BufferedWriter(output)
    sys.stdout = io.TextIOWrapper(
        raw,
        encoding=old.encoding,
        errors=old.errors,
        line_buffering=getattr(old, "line_buffering", False),
        write_through=getattr(old, "write_through", False),
    )
    return output
