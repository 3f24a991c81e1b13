"""``rl-system report``: write the report of a run, whatever state it is in."""

from __future__ import annotations

import argparse
import sys

from rl_system.runs.directory import RunDirectory
from rl_system.runs.report import build_report


def run(args: list[str]) -> int:
    """Write ``report.html`` and print its path; returns the exit code: 0 done, 2 ``RUN_DIRECTORY`` is no run."""
    parser = argparse.ArgumentParser("rl-system report", description="Write report.html of a run, also while it runs.")
    parser.add_argument("run_directory", metavar="RUN_DIRECTORY", help="for example runs/toy")
    try:
        options = parser.parse_args(args)
    except SystemExit as stop:  # of --help, or of arguments that argparse has already complained about
        return int(stop.code or 0)
    try:
        directory = RunDirectory.open(options.run_directory)
    except ValueError as error:
        print(f"rl-system report: {error}", file=sys.stderr)
        return 2
    print(build_report(directory))
    return 0
