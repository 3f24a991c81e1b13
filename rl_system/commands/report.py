"""``rl-system report``: write the report of a run, whatever state it is in, or put several runs side by side."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rl_system.commands import exit_codes
from rl_system.runs.directory import RunDirectory


def run(args: list[str]) -> int:
    """Write the page and print its path; returns the exit code: 0 done, 2 a ``RUN_DIRECTORY`` is no run."""
    from rl_system.runs.comparison import build_comparison
    from rl_system.runs.report import build_report

    parser = argparse.ArgumentParser(
        "rl-system report", description="Write report.html of a run, also while it runs; of several runs, one page."
    )
    parser.add_argument("run_directories", metavar="RUN_DIRECTORY", nargs="+", help="for example runs/toy")
    parser.add_argument(
        "--output", type=Path, help="of several runs; default: compare.html in the folder of the first one"
    )
    options = parser.parse_args(args)
    try:
        runs = [RunDirectory.open(path) for path in options.run_directories]
        if len(runs) == 1 and options.output is None:
            print(build_report(runs[0]))
        elif len(runs) == 1:
            raise ValueError("--output is for several runs; the report of one lies in its directory")
        else:
            print(build_comparison(runs, options.output or runs[0].path.parent / "compare.html"))
    except (ValueError, OSError) as error:
        print(f"rl-system report: {error}", file=sys.stderr)
        return exit_codes.BAD_INPUT
    return exit_codes.OK
