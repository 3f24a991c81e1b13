"""``rl-system train``: the main job."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from rl_system.commands import exit_codes
from rl_system.config.compose import ConfigError, load_config, to_yaml
from rl_system.config.schema import TrainConfig

if TYPE_CHECKING:
    from rl_system.data.rows import RowSource
    from rl_system.runs.directory import RunDirectory

NAMESPACE = "rl-system"


def run(overrides: list[str]) -> int:
    """Train; returns the exit code: 0 done, 1 error, 2 bad configuration or input, 75 stopped, 130 interrupted."""
    try:
        config = load_config(overrides)
    except ConfigError as error:
        print(f"rl-system train: {error}", file=sys.stderr)
        return exit_codes.BAD_INPUT
    return _train(config)


def _train(config: TrainConfig) -> int:
    from rl_system import assembly  # from here on the heavy packages are needed
    from rl_system.runs.directory import RunStopped
    from rl_system.runs.report import build_report
    from rl_system.runs.summary import write_summary

    try:
        run = _existing_run(config)
        if run is not None and run.status().get("state") == "done":
            print(f"{run.path} is done; report: {run.report}")
            return exit_codes.OK
        source = assembly.row_source(config)
        if config.cluster.address != "local":
            _connect(config)  # only the cluster knows what it has
        assembly.check_resources(config)
        run, claim, resumed = _claimed_run(config, run)
    except (ValueError, ConnectionError) as error:
        print(f"rl-system train: {error}", file=sys.stderr)
        return exit_codes.BAD_INPUT
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        summary = _execute(config, run, resumed, source)
        write_summary(run, summary)
        run.set_status("done")
        code = exit_codes.OK
    except RunStopped as stop:
        run.set_status("stopped", str(stop))
        print(f"rl-system train: {stop}; resume=auto goes on with {run.path}", file=sys.stderr)
        summary, code = None, exit_codes.STOPPED
    except KeyboardInterrupt:
        run.set_status("interrupted", "stopped by a signal")
        print(f"rl-system train: interrupted; what was done is in {run.path}", file=sys.stderr)
        summary, code = None, exit_codes.INTERRUPTED
    except Exception as error:
        run.set_status("failed", f"{type(error).__name__}: {error}")
        print(f"rl-system train: {type(error).__name__}: {error}\nlogs: {run.path}/logs", file=sys.stderr)
        if os.environ.get("RL_SYSTEM_TRACEBACK"):
            raise
        summary, code = None, exit_codes.ERROR
    finally:
        claim.close()
    report = build_report(run)
    if summary is not None:
        from rl_system.runs.progress import print_summary

        print_summary(summary, report)
    return code


def _existing_run(config: TrainConfig) -> RunDirectory | None:
    """The run that ``resume=auto`` finds."""
    from rl_system.runs.directory import RunDirectory

    if config.resume == "never":
        return None
    return RunDirectory.resume(config.output_dir, config.name, to_yaml(config))


def _claimed_run(config: TrainConfig, existing: RunDirectory | None) -> tuple[RunDirectory, IO[str], bool]:
    """The run, a lock on it, and whether it goes on."""
    from rl_system.runs.directory import RunDirectory

    if existing is None:
        run = RunDirectory.create(config.output_dir, config.name, to_yaml(config), config.overwrite)
        return run, run.lock(), False
    claim = existing.lock()
    existing.set_status("running")
    return existing, claim, True


def _execute(config: TrainConfig, run: RunDirectory, resumed: bool, source: RowSource) -> dict[str, Any]:
    import ray

    from rl_system.runs.progress import Progress

    with Progress() as progress:
        progress.stage("starting Ray")
        context = _connect(config)
        from rl_system.training import TrainingRun  # while Ray's own processes come up

        logs = run.logs / "ray"
        logs.unlink(missing_ok=True)
        logs.symlink_to(Path(context.address_info["session_dir"]) / "logs")
        try:
            return asyncio.run(TrainingRun(config, run, resumed, source, progress).execute())
        finally:
            ray.shutdown()


def _connect(config: TrainConfig) -> Any:
    """Start Ray or join the cluster; a second call returns the context of the first.

    Raises:
        ConnectionError: there is no cluster to join.
    """
    import ray

    local = config.cluster.address == "local"
    os.environ.setdefault("RAY_AUTH_MODE", "disabled" if local else "token")
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", str(int(config.reward.start_timeout_s)))
    os.environ.setdefault("RAY_SERVE_QUEUE_LENGTH_RESPONSE_DEADLINE_S", "5")  # replicas answer between model calls
    if local:
        os.environ.setdefault("RAY_worker_niceness", "0")  # the driver shares the cores with the workers
    for noisy in ("ray.serve", "ray.train"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    return ray.init(
        address=config.cluster.address,  # None in place of "local" would join a cluster that Ray finds
        num_cpus=config.cluster.num_cpus if local else None,
        namespace=NAMESPACE,
        include_dashboard=False if local else None,
        ignore_reinit_error=True,
        log_to_driver=False,
    )
