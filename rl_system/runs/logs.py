"""The log of a run's driver: one JSON object per line, with the run's name, and step and group where there is one."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime

from rl_system.runs.directory import RunDirectory, RunStopped

OURS = ("rl_system", "actors", "reward_servers", "learners")
_FIELDS = ("step", "group_id")
"""What a call may give in ``extra``."""


class JsonFile(logging.FileHandler):
    """Has ``time`` (UTC), ``level``, ``logger``, ``run``, ``message``; ``step``, ``group_id``, ``exception`` if any.

    ``ray.init`` gives the handlers of its logger another formatter and another level: neither counts here.
    """

    def __init__(self, run: RunDirectory) -> None:
        super().__init__(run.logs / "driver.jsonl")
        self._run = run.name
        self._exceptions = logging.Formatter()

    def filter(self, record: logging.LogRecord) -> bool:
        """All of our own; of others warnings and errors."""
        return record.levelno >= logging.WARNING or record.name.partition(".")[0] in OURS

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "run": self._run,
            "message": record.getMessage(),
            **{name: getattr(record, name) for name in _FIELDS if hasattr(record, name)},
        }
        if record.exc_info:
            line["exception"] = self._exceptions.formatException(record.exc_info)
        return json.dumps(line)


@contextmanager
def driver_log(run: RunDirectory) -> Iterator[None]:
    """Append this process's log to ``logs/driver.jsonl``: all of our own, of Ray warnings and errors.

    An exception that leaves the block is logged with its traceback.
    """
    handler = JsonFile(run)
    ours = [logging.getLogger(name) for name in OURS]
    levels = [logger.level for logger in ours]
    loggers = [*ours, logging.getLogger("ray")]
    for logger in loggers:
        logger.addHandler(handler)
    for logger in ours:
        logger.setLevel(logging.INFO)
    try:
        yield
    except Exception as error:
        level = logging.INFO if isinstance(error, RunStopped) else logging.ERROR
        logging.getLogger(__name__).log(level, "%s: %s", type(error).__name__, error, exc_info=True)
        raise
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
        for logger, level in zip(ours, levels, strict=True):
            logger.setLevel(level)
        handler.close()
