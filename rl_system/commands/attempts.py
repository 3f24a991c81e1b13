"""What commands that train have in common: one attempt at a run, from its directory to its exit code."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Protocol

from rl_system.commands import exit_codes

if TYPE_CHECKING:
    from rl_system.runs.directory import RunDirectory

NAMESPACE = "rl-system"
UPLOADED = "working_dir_files"
"""Of the folder into which Ray unpacks what `ray job submit --working-dir` has uploaded."""


class RunSettings(Protocol):
    """Settings that every run has."""

    name: str
    output_dir: str
    overwrite: bool
    resume: str


class ClusterSettings(Protocol):
    """Where Ray is: ``local``, ``auto`` or an address; CPUs of a local one."""

    address: str
    num_cpus: int | None


def existing_run(config: RunSettings, config_yaml: str) -> RunDirectory | None:
    """The run that ``resume=auto`` finds.

    Raises:
        ValueError: it was made with other settings that matter, or runs would lie in the upload of a Ray job.
    """
    from rl_system.runs.directory import RunDirectory

    if UPLOADED in Path(config.output_dir).resolve().parts:
        raise ValueError(
            f"output_dir={config.output_dir} lies in the uploaded working directory, which Ray deletes after the job: "
            "name a folder by its full path, as output_dir=/shared/runs"
        )
    if config.resume == "never":
        return None
    return RunDirectory.resume(config.output_dir, config.name, config_yaml)


def claimed_run(
    config: RunSettings, config_yaml: str, existing: RunDirectory | None
) -> tuple[RunDirectory, IO[str], bool]:
    """The run, a lock on it, and whether it goes on.

    Raises:
        ValueError: there is one of this name already, or another process writes to it.
    """
    from rl_system.runs.directory import RunDirectory

    if existing is None:
        run = RunDirectory.create(config.output_dir, config.name, config_yaml, config.overwrite)
        return run, run.lock(), False
    claim = existing.lock()
    existing.set_status("running")
    return existing, claim, True


def guarded(
    program: str, run: RunDirectory, claim: IO[str], execute: Callable[[], dict[str, Any]]
) -> tuple[int, dict[str, Any] | None]:
    """Execute; exit code, and the summary of a run that is done. Else the run's status and one message say why."""
    from rl_system.runs.directory import RunStopped
    from rl_system.runs.logs import driver_log

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with driver_log(run):
            summary = execute()
        run.set_status("done")
        return exit_codes.OK, summary
    except RunStopped as stop:
        run.set_status("stopped", str(stop))
        print(f"{program}: {stop}; resume=auto goes on with {run.path}", file=sys.stderr)
        return exit_codes.STOPPED, None
    except KeyboardInterrupt:
        run.set_status("interrupted", "stopped by a signal")
        print(f"{program}: interrupted; what was done is in {run.path}", file=sys.stderr)
        return exit_codes.INTERRUPTED, None
    except Exception as error:
        run.set_status("failed", f"{type(error).__name__}: {error}")
        print(f"{program}: {type(error).__name__}: {error}\nlogs: {run.path}/logs", file=sys.stderr)
        if os.environ.get("RL_SYSTEM_TRACEBACK"):
            raise
        return exit_codes.ERROR, None
    finally:
        claim.close()


def connect(cluster: ClusterSettings, start_timeout_s: float, run: str) -> Any:
    """Start Ray or join the cluster; a second call returns the context of the first.

    Args:
        start_timeout_s: that Ray Train waits for its workers.
        run: name that the workers' logs have.

    Raises:
        ConnectionError: there is no cluster to join.
    """
    import ray

    from rl_system.runs.worker_logs import WorkerLogs

    local = cluster.address == "local"
    os.environ.setdefault("RAY_AUTH_MODE", "disabled" if local else "token")
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", str(int(start_timeout_s)))
    os.environ.setdefault("RAY_SERVE_QUEUE_LENGTH_RESPONSE_DEADLINE_S", "5")  # replicas answer between model calls
    if local:
        os.environ.setdefault("RAY_worker_niceness", "0")  # the driver shares the cores with the workers
    for noisy in ("ray.serve", "ray.train"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    return ray.init(
        address=cluster.address,  # None in place of "local" would join a cluster that Ray finds
        num_cpus=cluster.num_cpus if local else None,
        namespace=NAMESPACE,
        include_dashboard=False if local else None,
        ignore_reinit_error=True,
        log_to_driver=False,
        logging_config=WorkerLogs(run=run),
    )
