"""``rl-system doctor``: a machine and a configuration, looked at before anything is started."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from rl_system.commands import exit_codes
from rl_system.config.compose import ConfigError, compose_config

if TYPE_CHECKING:
    from rl_system.doctor.report import Report

PROGRAM = "rl-system doctor"


def run(args: list[str]) -> int:
    """Look; returns the exit code: 0 all fits, 1 something does not, 2 bad configuration or arguments."""
    options = _parser().parse_intermixed_args(args)
    try:
        config = compose_config(options.overrides)
        from rl_system.doctor.machine import planned, this_machine  # torch is needed from here on
        from rl_system.doctor.report import examine

        machine = planned(options.gpus, options.memory) if options.gpus else this_machine(options.memory)
        report = examine(config, machine)
    except (ConfigError, ValueError) as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return exit_codes.BAD_INPUT
    if options.json:
        print(json.dumps(report.as_json(), indent=2))
    else:
        _show(report, Console(width=max(Console().width, 150), markup=False, highlight=False))
    return exit_codes.OK if report.good else exit_codes.ERROR


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        PROGRAM, description="Does this machine hold this experiment? Nothing is started (docs/doctor.md)."
    )
    parser.add_argument("overrides", nargs="+", metavar="KEY=VALUE", help="as of `rl-system train`: experiment=...")
    parser.add_argument("--gpus", metavar="NxGB", help="plan for another machine: 8x80 is 8 GPUs of 80 GB")
    parser.add_argument(
        "--memory", metavar="GIB", type=float, help="host memory to plan with, in place of what is free"
    )
    parser.add_argument("--json", action="store_true", help="for machines, bytes")
    return parser


def _show(report: Report, console: Console) -> None:
    table = Table(*report.head, title=report.title)
    for column in table.columns:
        column.justify, column.no_wrap = "right", True
    table.columns[0].justify = "left"
    for row in report.rows:
        table.add_row(*row)
    console.print(table)
    for line in report.notes:
        console.print(line)
    checks = Table("check", "", "found")
    for check in report.checks:
        mark = {True: "ok", False: "BAD", None: "-"}[check.good]
        found = f"{check.found}\n-> {check.remedy}" if check.good is False and check.remedy else check.found
        checks.add_row(check.name, mark, found)
    console.print(checks)
    for problem in report.problems:
        console.print(problem, soft_wrap=True)
    console.print("All fits." if report.good else "Not ready.")
