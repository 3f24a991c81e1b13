"""``rl-system train``: the main job."""

from __future__ import annotations

import asyncio
import sys
from typing import TYPE_CHECKING, Any

from rl_system.commands import exit_codes
from rl_system.commands.attempts import claimed_run, connect, existing_run, guarded
from rl_system.config.compose import ConfigError, load_config, to_yaml
from rl_system.config.schema import TrainConfig

if TYPE_CHECKING:
    from rl_system.data.rows import RowSource
    from rl_system.runs.directory import RunDirectory
    from rl_system.runs.keeping import Keeper

PROGRAM = "rl-system train"


def run(overrides: list[str]) -> int:
    """Train; returns the exit code: 0 done, 1 error, 2 bad configuration or input, 75 stopped, 130 interrupted."""
    try:
        config = load_config(overrides)
    except ConfigError as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return exit_codes.BAD_INPUT
    return _train(config)


def _train(config: TrainConfig) -> int:
    from rl_system import assembly  # from here on the heavy packages are needed
    from rl_system.runs.report import build_report
    from rl_system.runs.summary import write_summary
    from rl_system.runs.trackers import check_trackers

    try:
        check_trackers(config.trackers)
        existing = existing_run(config, to_yaml(config))
        if existing is not None and existing.status().get("state") == "done":
            print(f"{existing.place} is done; report: {existing.named('report.html')}")
            return exit_codes.OK
        source = assembly.row_source(config)
        if config.cluster.address != "local":
            connect(config.cluster, config.reward.start_timeout_s, config.name)  # only the cluster knows what it has
        assembly.check_resources(config)
        run, keeper, resumed = claimed_run(config, to_yaml(config), existing)
    except (ValueError, ConnectionError) as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return exit_codes.BAD_INPUT

    def execute() -> dict[str, Any]:
        summary = _execute(config, run, keeper, resumed, source)
        write_summary(run, summary)
        return summary

    code, summary = guarded(PROGRAM, run, keeper, execute, finish=lambda: build_report(run))
    if summary is not None:
        from rl_system.runs.progress import print_summary

        print_summary(summary, run.named("report.html"))
    return code


def _execute(
    config: TrainConfig, run: RunDirectory, keeper: Keeper, resumed: bool, source: RowSource
) -> dict[str, Any]:
    import ray

    from rl_system.runs.attempt import note_attempt
    from rl_system.runs.progress import Progress

    with Progress() as progress:
        progress.stage("starting Ray")
        context = connect(config.cluster, config.reward.start_timeout_s, config.name)
        from rl_system.training import TrainingRun  # while Ray's own processes come up

        note_attempt(run, context)
        try:
            return asyncio.run(TrainingRun(config, run, resumed, source, progress, keeper.flush).execute())
        finally:
            ray.shutdown()
