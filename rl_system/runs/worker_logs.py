"""The logs of a run's worker processes: JSON lines in Ray's own files, each with the run's name.

Ray writes what a worker says into ``SESSION/logs/worker-*.err`` of its node, where log collectors look. Its JSON has
job, node, worker, actor and task of each line, and what a call gives in ``extra``.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from ray import LoggingConfig

from rl_system.runs.logs import OURS


class OfRun(logging.Filter):
    """All of our own and of Ray's, of others warnings and errors; each with ``run``."""

    def __init__(self, run: str) -> None:
        super().__init__()
        self._run = run

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether it is written."""
        record.run = self._run
        return record.levelno >= logging.WARNING or record.name.partition(".")[0] in (*OURS, "ray")


@dataclass
class _InWorkers(LoggingConfig):
    run: str = ""

    def _apply(self) -> None:
        super()._apply()
        for handler in {*logging.getLogger().handlers, *logging.getLogger("ray").handlers}:
            handler.addFilter(OfRun(self.run))


@dataclass
class WorkerLogs(LoggingConfig):
    """For ``ray.init(logging_config=)``: the workers of the job write JSON; the driver's own logging stays as it is.

    Ray applies the same object in the driver and in each worker, where it is unpickled: there it is another.
    """

    run: str = ""

    def _apply(self) -> None:
        pass

    def __reduce__(self) -> tuple[Any, ...]:
        return _InWorkers, ("JSON", "INFO", ["name"], self.run)
