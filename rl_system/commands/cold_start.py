"""``rl-system cold-start``: supervised training on prepared data."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any

from rl_system.commands import exit_codes
from rl_system.commands.attempts import claimed_run, connect, existing_run, guarded

if TYPE_CHECKING:
    from learners.spec import LearnerSpec
    from rl_system.cold_start.settings import ColdStartConfig
    from rl_system.runs.directory import RunDirectory
    from rl_system.runs.keeping import Keeper

PROGRAM = "rl-system cold-start"


def run(overrides: list[str]) -> int:
    """Train; returns the exit code: 0 done, 1 error, 2 bad configuration or input, 75 stopped, 130 interrupted."""
    from rl_system.cold_start import settings
    from rl_system.cold_start.data import check_layout
    from vlcot.policy.family import Family

    if overrides in (["-h"], ["--help"]):
        print(f"usage: {PROGRAM} recipe=toy|paper|authors data=DIR [KEY=VALUE ...]; see docs/cold-start.md")
        return exit_codes.OK
    try:
        config = settings.load(overrides)
        text = settings.to_yaml(config)
        existing = existing_run(config, text)
        if existing is not None and existing.status().get("state") == "done":
            print(f"{existing.place} is done; summary: {existing.named('summary.json')}")
            return exit_codes.OK
        rows = check_layout(config.data, Family.from_pretrained(config.policy.path).layout.full_size)
        spec = settings.learner_spec(config, config.policy.path, rows)
        if config.cluster.address != "local":
            connect(config.cluster, config.evaluation.start_timeout_s, config.name)
        directory, keeper, _ = claimed_run(config, text, existing)
    except (ValueError, ConnectionError) as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return exit_codes.BAD_INPUT
    code, summary = guarded(PROGRAM, directory, keeper, lambda: _execute(config, spec, directory, keeper))
    if summary is not None:
        _print(summary, directory)
    return code


def _execute(config: ColdStartConfig, spec: LearnerSpec, run: RunDirectory, keeper: Keeper) -> dict[str, Any]:
    from dataclasses import replace

    import ray

    from rl_system.cold_start.lookout import live_file
    from rl_system.cold_start.run import evaluate, random_start, train
    from rl_system.runs.attempt import note_attempt
    from rl_system.runs.files import write_json
    from rl_system.runs.progress import Progress
    from rl_system.runs.sinks import read_metrics

    began = time.time()
    with Progress() as progress, live_file(run, progress):
        if config.policy.random:
            progress.stage("making random weights")
            spec = replace(spec, policy_path=random_start(config, run))
        progress.stage("starting Ray")
        note_attempt(run, connect(config.cluster, config.evaluation.start_timeout_s, config.name))
        try:
            result = train(config, spec, run, progress, keeper.flush)
            trained_s = time.time() - began
            figures = evaluate(config, run.local_policy(result.policy_path), run, progress)
        finally:
            ray.shutdown()
    last = read_metrics(run.metrics)[-1].values
    losses = {name: value for name, value in last.items() if name.startswith("heldout/")}
    summary = {
        "steps": result.steps,
        "trained_s": trained_s,
        "wall_s": time.time() - began,
        "policy": run.named(f"checkpoints/{config.name}/policy"),
        **losses,
        **figures,
    }
    write_json(run.summary, summary)
    return summary


def _print(summary: dict[str, Any], run: RunDirectory) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title=f"{summary['steps']} steps, {summary['trained_s']:.0f} s; {summary['prompts']} held-out prompts"
    )
    table.add_column("")
    table.add_column("", justify="right")
    for name, value in summary.items():
        if name.startswith("heldout/loss") or name in ("format_rate", "degradation_accuracy", "image_rate", "psnr"):
            table.add_row(name, "-" if value is None else f"{value:.3f}")
    console = Console()
    console.print(table)
    console.print(f"policy: {summary['policy']}\nrun: {run.place}", markup=False, highlight=False, soft_wrap=True)
