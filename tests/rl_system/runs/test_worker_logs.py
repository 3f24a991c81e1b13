"""What Ray is told about logging: nothing for the driver, JSON with the run's name for the workers."""

from __future__ import annotations

import io
import json
import logging
import pickle

import pytest

from rl_system.runs.worker_logs import WorkerLogs

pytestmark = pytest.mark.unit


@pytest.fixture
def root():
    """The root logger; afterwards it, Ray's and the making of records are as before."""
    loggers = [logging.getLogger(), logging.getLogger("ray")]
    before = [(logger.level, logger.handlers[:], logger.propagate) for logger in loggers]
    factory = logging.getLogRecordFactory()
    yield loggers[0]
    logging.setLogRecordFactory(factory)
    for logger, (level, handlers, propagate) in zip(loggers, before, strict=True):
        logger.setLevel(level)
        logger.handlers[:] = handlers
        logger.propagate = propagate


def test_the_driver_logs_as_before(root):
    before = root.handlers[:], root.level
    WorkerLogs(run="mine")._apply()
    assert (root.handlers, root.level) == before


def test_a_worker_logs_json_with_the_run_and_what_the_call_gives(root):
    root.handlers.clear()  # pytest's own
    pickle.loads(pickle.dumps(WorkerLogs(run="mine")))._apply()
    (handler,) = root.handlers
    handler.setStream(written := io.StringIO())
    logging.getLogger("actors.rollout_actor").info("generated %d", 3, extra={"group_id": "g-1"})
    logging.getLogger("learners.loop").info("trained", extra={"step": 7})
    logging.getLogger("another.library").info("of no interest")
    logging.getLogger("another.library").warning("of some")
    first, second, third = [json.loads(line) for line in written.getvalue().splitlines()]
    wanted = {"run": "mine", "message": "generated 3", "group_id": "g-1", "name": "actors.rollout_actor"}
    assert first.items() >= (wanted | {"levelname": "INFO"}).items()
    assert (second["run"], second["step"]) == ("mine", 7) and "group_id" not in second
    assert (third["run"], third["name"], third["levelname"]) == ("mine", "another.library", "WARNING")
