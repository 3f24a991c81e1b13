"""What commands that train have in common: one attempt at a run, from its directory to its exit code."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from rl_system.commands import exit_codes
from rl_system.config.uris import is_uri

if TYPE_CHECKING:
    from rl_system.runs.directory import RunDirectory
    from rl_system.runs.keeping import Keeper
    from rl_system.runs.store import StoredRun

NAMESPACE = "rl-system"
UPLOADED = "working_dir_files"
"""Of the folder into which Ray unpacks what `ray job submit --working-dir` has uploaded."""


class RunSettings(Protocol):
    """Settings that every run has."""

    name: str
    output_dir: str
    scratch_dir: str | None
    overwrite: bool
    resume: str


class ClusterSettings(Protocol):
    """Where Ray is: ``local``, ``auto`` or an address; CPUs of a local one."""

    address: str
    num_cpus: int | None


def existing_run(config: RunSettings, config_yaml: str) -> RunDirectory | StoredRun | None:
    """The run that ``resume=auto`` finds.

    Raises:
        ValueError: it was made with other settings that matter, runs would lie in the upload of a Ray job, or the store
            of ``output_dir`` cannot be used.
    """
    from rl_system.runs.keeping import find

    if not is_uri(config.output_dir) and UPLOADED in Path(config.output_dir).resolve().parts:
        raise ValueError(
            f"output_dir={config.output_dir} lies in the uploaded working directory, which Ray deletes after the job: "
            "name a folder by its full path, as output_dir=/shared/runs"
        )
    if config.resume == "never":
        return None
    return find(config.output_dir, config.name, config_yaml)


def claimed_run(
    config: RunSettings, config_yaml: str, existing: RunDirectory | StoredRun | None
) -> tuple[RunDirectory, Keeper, bool]:
    """The run, what keeps it for this attempt, and whether it goes on.

    Raises:
        ValueError: there is one of this name already, another attempt has it, or its store cannot be used.
    """
    from rl_system.runs.keeping import claim_existing, claim_new

    if existing is None:
        run, keeper = claim_new(config.output_dir, config.name, config_yaml, config.overwrite, config.scratch_dir)
        return run, keeper, False
    return *claim_existing(existing, config.scratch_dir), True


def guarded(
    program: str,
    run: RunDirectory,
    keeper: Keeper,
    execute: Callable[[], dict[str, Any]],
    finish: Callable[[], object] = lambda: None,
) -> tuple[int, dict[str, Any] | None]:
    """Execute; exit code, and the summary of a run that is done. Else the run's status and one message say why.

    Args:
        finish: writes to the run whatever became of it.
    """
    from rl_system.runs.store import StoreError

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if run.home is not None:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # the way in which a lost store ends the run
    try:
        code, summary = _executed(program, run, keeper, execute)
        finish()
    finally:
        try:
            keeper.close()
        except StoreError as error:
            print(f"{program}: {error}\nwhat the store does not have is in {run.path}", file=sys.stderr)
            code, summary = exit_codes.ERROR, None
    return code, summary


def _executed(
    program: str, run: RunDirectory, keeper: Keeper, execute: Callable[[], dict[str, Any]]
) -> tuple[int, dict[str, Any] | None]:
    from rl_system.runs.directory import RunStopped
    from rl_system.runs.logs import driver_log

    try:
        with driver_log(run):
            summary = execute()
        run.set_status("done")
        return exit_codes.OK, summary
    except RunStopped as stop:
        run.set_status("stopped", str(stop))
        print(f"{program}: {stop}; resume=auto goes on with {run.place}", file=sys.stderr)
        return exit_codes.STOPPED, None
    except (Exception, KeyboardInterrupt) as error:
        if keeper.error is not None:  # said when the keeper is closed
            run.set_status("failed", str(keeper.error))
            return exit_codes.ERROR, None
        if isinstance(error, KeyboardInterrupt):
            run.set_status("interrupted", "stopped by a signal")
            print(f"{program}: interrupted; what was done is in {run.place}", file=sys.stderr)
            return exit_codes.INTERRUPTED, None
        run.set_status("failed", f"{type(error).__name__}: {error}")
        print(f"{program}: {type(error).__name__}: {error}\nlogs: {run.named('logs')}", file=sys.stderr)
        if os.environ.get("RL_SYSTEM_TRACEBACK"):
            raise
        return exit_codes.ERROR, None


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
