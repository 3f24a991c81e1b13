"""``rl-system simulate``: how fast a run would be, by measured costs here or estimated ones on a cluster."""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from rl_system.commands import exit_codes
from rl_system.commands.arguments import natural, positive

if TYPE_CHECKING:
    from rl_system.studies.scaling.search import Plan

PROGRAM = "rl-system simulate"


def run(args: list[str]) -> int:
    """Simulate; returns the exit code: 0 done, 2 refused, 130 interrupted."""
    options = _parser().parse_args(args)
    try:
        options.action(options)
    except ValueError as error:
        print(f"{PROGRAM} {options.name}: {error}", file=sys.stderr)
        return exit_codes.BAD_INPUT
    except KeyboardInterrupt:
        print(f"{PROGRAM} {options.name}: interrupted", file=sys.stderr)
        return exit_codes.INTERRUPTED
    return exit_codes.OK


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(PROGRAM, description="A discrete-event model of the pipeline (docs/scaling.md).")
    actions = parser.add_subparsers(dest="name", required=True)

    measured = actions.add_parser("run", help="costs from runs on one machine; other settings on the same machine")
    measured.set_defaults(action=_run)
    add = measured.add_argument
    add(
        "runs",
        metavar="RUN_DIRECTORY",
        nargs="+",
        help="for example runs/toy; several tell fixed costs from growing ones",
    )
    add("--max-staleness", metavar="N", type=natural, nargs="+", default=[0, 1, 3], help="default 0 1 3")
    add("--groups-per-step", metavar="N", type=positive, nargs="+", help="default: that of the first run")
    add("--cores", metavar="N", type=positive, help="of the machine that ran them; default: those of this one")

    cluster = actions.add_parser("cluster", help="estimated costs of 7B; the best split of GPUs, or a given one")
    cluster.set_defaults(action=_cluster)
    add = cluster.add_argument
    add("--costs", metavar="FILE", type=Path, help="figures with their sources; default: 7B on H100")
    add("--gpus", metavar="N", type=positive, nargs="+", default=[8, 64], help="default 8 64; 1024 takes minutes")
    add(
        "--split",
        metavar="L/R/D/E",
        type=_split,
        nargs="+",
        default=[],
        help="GPUs of learner, rollout, detector, expert",
    )
    add("--max-staleness", metavar="N", type=natural, nargs="+", default=[0, 1, 2], help="default 0 1 2")
    add("--groups-per-step", metavar="N", type=positive, help="default: the smallest that is nearly the fastest")
    add(
        "--time",
        metavar="KIND=F",
        type=_factor,
        nargs="+",
        default=[],
        help="rollout=0.5: it takes half the time",
    )
    add("--tokenizer-on-gpu", action="store_true", help="as if driver and actors had the image tokenizer on a GPU")
    return parser


def _split(text: str) -> tuple[int, ...]:
    parts = text.split("/")
    if len(parts) != 4 or not all(part.isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(f"'{text}' is not four numbers as 4/2/1/1")
    return tuple(map(int, parts))


def _factor(text: str) -> tuple[str, float]:
    kind, _, factor = text.partition("=")
    try:
        return kind, float(factor)
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is not KIND=FACTOR") from None


def _run(options: argparse.Namespace) -> None:
    from rl_system.runs.directory import RunDirectory
    from rl_system.studies.scaling.calibration import fit, pipeline_of, simulated
    from rl_system.studies.scaling.measured import read_run
    from rl_system.studies.scaling.pipeline import steady

    runs = [read_run(RunDirectory.open(path)) for path in options.runs]
    cores = options.cores or len(os.sched_getaffinity(0))
    costs = fit(runs, cores)
    fitted = Table("run", "groups\n/step", "stale-\nness", "step s", "generate\ns", "reward\ns", "train\ns")
    fitted.title = "Measured, and by the model with costs fitted to it"
    for measured in runs:
        model = simulated(costs, measured, cores)
        pairs = (
            (measured.step_s, model.step_s),
            (measured.generation_s, model.generation_s),
            (measured.reward_s, model.reward_s),
            (measured.train_s, model.train_s),
        )
        setting = measured.setting
        cells = [f"{seen:.2f} {found:.2f}" for seen, found in pairs]
        fitted.add_row(measured.name, str(setting.groups_per_step), str(setting.max_staleness), *cells)

    predicted = Table(
        "groups\n/step", "stale-\nness", "step s", "groups/s", "learner\nbusy", "rollout\nbusy", "expert\nbusy"
    )
    predicted.title = f"Predicted for a long run on {cores:g} cores"
    for groups in options.groups_per_step or [runs[0].setting.groups_per_step]:
        for staleness in options.max_staleness:
            setting = replace(runs[0].setting, groups_per_step=groups, max_staleness=staleness)
            outcome = steady(pipeline_of(costs, setting, runs[0], cores))
            busy = [f"{outcome.busy[kind]:.0%}" for kind in ("learner", "rollout", "expert")]
            rate = groups / outcome.step_s
            predicted.add_row(str(groups), str(staleness), f"{outcome.step_s:.2f}", f"{rate:.2f}", *busy)
    console = _console()
    console.print(fitted, predicted)
    if len({measured.setting.groups_per_step for measured in runs}) == 1:
        console.print(
            "One groups_per_step was measured: how a cost divides into a fixed and a growing part is the shipped toy's."
        )


def _cluster(options: argparse.Namespace) -> None:
    from rl_system.studies.scaling.hardware import SHIPPED, Allocation, Cluster, read_figures
    from rl_system.studies.scaling.pipeline import KINDS
    from rl_system.studies.scaling.search import best_batch, best_plan, bottleneck, evaluate

    name, figures = read_figures(options.costs or SHIPPED)
    cluster = Cluster(figures, options.tokenizer_on_gpu)
    for kind, factor in options.time:
        cluster = cluster.scaled(**{kind: factor})
    table = Table("GPUs", "learner/rollout/\ndetector/expert", "stale-\nness", "groups\n/step", "groups/s", "step s")
    table.title = f"{name}: estimates, not measurements (docs/scaling.md)"
    for kind in KINDS:
        table.add_column(f"{kind}\nbusy", justify="right")
    table.add_column("10 % faster would give")

    def show(plan: Plan) -> None:
        gains = bottleneck(cluster, plan)
        worth = [f"{kind} +{gain:.0%}" for kind, gain in gains.items() if gain >= 0.01]
        busy = [f"{plan.outcome.busy[kind]:.0%}" for kind in KINDS]
        facts = (plan.allocation.gpus, plan.allocation, plan.max_staleness, plan.groups_per_step)
        speed = f"{plan.rate:.3f}", f"{plan.outcome.step_s:.0f}"
        table.add_row(*map(str, facts), *speed, *busy, ", ".join(worth) or "nothing: slots")

    for allocation in [Allocation(*split) for split in options.split]:
        for staleness in options.max_staleness:
            groups = options.groups_per_step or best_batch(cluster, allocation.gpus, staleness)
            show(evaluate(cluster, allocation, groups, staleness))
    for gpus in [] if options.split else options.gpus:
        for staleness in options.max_staleness:
            groups = options.groups_per_step or best_batch(cluster, gpus, staleness)
            show(best_plan(cluster, gpus, groups, staleness))
    _console().print(table)


def _console() -> Console:
    """As wide as the tables, also where the output is no terminal."""
    return Console(width=max(Console().width, 150))
