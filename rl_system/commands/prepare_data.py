"""``rl-system prepare-data``: from a folder of photographs to training data."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from rl_system.commands import exit_codes

if TYPE_CHECKING:
    from rl_system.preparation.pipeline import Job
    from rl_system.preparation.settings import PrepareConfig

PROGRAM = "rl-system prepare-data"


def run(overrides: list[str]) -> int:
    """Prepare; returns the exit code: 0 done, 1 error, 2 bad configuration or input, 130 interrupted."""
    from rl_system.preparation import pipeline, settings

    if overrides in (["-h"], ["--help"]):
        print(f"usage: {PROGRAM} input=DIR output=DIR captions=FILE [KEY=VALUE ...]; see docs/prepare-data.md")
        return exit_codes.OK
    try:
        config = settings.load(overrides)
        if config.url is not None:
            from reward_servers.http_guard import token_of_environment

            token_of_environment()
        job = pipeline.begin(config)
    except ValueError as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return exit_codes.BAD_INPUT
    try:
        _make(config, job)
        manifest = pipeline.finish(config, job)
    except KeyboardInterrupt:
        print(f"{PROGRAM}: interrupted; the same command goes on with {config.output}", file=sys.stderr)
        return exit_codes.INTERRUPTED
    except Exception as error:
        cause = str(error).strip().splitlines() or [""]
        print(f"{PROGRAM}: {type(error).__name__}: {cause[-1]}", file=sys.stderr)
        print(f"finished shards are kept; the same command goes on with {config.output}", file=sys.stderr)
        if os.environ.get("RL_SYSTEM_TRACEBACK"):
            raise
        return exit_codes.ERROR
    finally:
        job.claim.close()
    print(
        f"{config.output}: {manifest['rows']} rows of {manifest['images']} photographs, {manifest['skipped']} left out"
    )
    print(f"data card: {Path(config.output) / 'card.html'}")
    return exit_codes.OK


def _make(config: PrepareConfig, job: Job) -> None:
    if not job.missing:
        return
    import ray

    from rl_system.preparation import pipeline

    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    os.environ.setdefault("RAY_worker_niceness", "0")
    started = not ray.is_initialized()
    if started:
        ray.init(
            "local",
            num_cpus=pipeline.worker_count(config),
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
        )
    try:
        _show(config, job)
    finally:
        if started:
            ray.shutdown()


def _show(config: PrepareConfig, job: Job) -> None:
    """Progress in photographs, with the time that is left."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from rl_system.preparation import pipeline

    console = Console()
    total, kept = (sum(len(s.photographs) for s in part) for part in (job.missing, job.shards))
    print(f"{total} photographs to prepare in {len(job.missing)} shards; {kept - total} are done", flush=True)
    columns = TextColumn("photographs"), BarColumn(), MofNCompleteColumn(), TextColumn("ETA"), TimeRemainingColumn()
    began, done = time.monotonic(), 0
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=total)
        for shard in pipeline.make(config, job):
            done += len(shard.photographs)
            bar.update(task, completed=done)
            if not console.is_terminal:
                eta = (time.monotonic() - began) / done * (total - done)
                print(f"{done}/{total} photographs  ETA {int(eta) // 60}:{int(eta) % 60:02d}", flush=True)
