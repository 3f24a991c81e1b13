"""The logs of a run's worker processes: JSON lines in Ray's own files, each with the run's name.

Ray writes what a worker says into ``SESSION/logs/worker-*.err`` of its node, Ray Train what a learner rank says into
``train/ray-train-app-worker-*.log`` beside it, Serve the requests of a replica into ``serve/replica_*.log``. Their JSON
has node, worker and actor or replica of each line, and what a call gives in ``extra``.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from typing import Any

from ray import LoggingConfig

from rl_system.runs.logs import OURS

RUN_VARIABLE = "RL_SYSTEM_RUN"
"""Name of the run in the environment of its reward replicas, which Serve may start for a later job than its own."""


def of_interest(record: logging.LogRecord) -> bool:
    """All of our own and of Ray's, of others warnings and errors."""
    return record.levelno >= logging.WARNING or record.name.partition(".")[0] in (*OURS, "ray")


@dataclass
class _InWorkers(LoggingConfig):
    run: str = ""

    def _apply(self) -> None:
        super()._apply()
        for handler in {*logging.getLogger().handlers, *logging.getLogger("ray").handlers}:
            handler.addFilter(of_interest)
        make, run = logging.getLogRecordFactory(), os.environ.get(RUN_VARIABLE, self.run)

        def with_run(*arguments: Any, **named: Any) -> logging.LogRecord:
            record = make(*arguments, **named)
            record.run = run
            return record

        logging.setLogRecordFactory(with_run)  # Train and Serve put handlers of their own in place of these


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
