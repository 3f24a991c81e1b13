"""``rl-system report``: write the report of a run, whatever state it is in, or put several runs side by side."""

from __future__ import annotations

import argparse
import shutil
import sys
from contextlib import ExitStack
from pathlib import Path

from rl_system.commands import exit_codes
from rl_system.runs.directory import RunDirectory


def run(args: list[str]) -> int:
    """Write the page and print its path; returns the exit code: 0 done, 2 a ``RUN_DIRECTORY`` is no run."""
    from rl_system.runs.comparison import build_comparison
    from rl_system.runs.keeping import readable
    from rl_system.runs.report import build_report

    parser = argparse.ArgumentParser(
        "rl-system report", description="Write report.html of a run, also while it runs; of several runs, one page."
    )
    parser.add_argument("run_directories", metavar="RUN_DIRECTORY", nargs="+", help="for example runs/toy, or a URI")
    parser.add_argument(
        "--output",
        type=Path,
        help="of several runs, default compare.html in the folder of the first one; of one in a store, NAME.html",
    )
    options = parser.parse_args(args)
    try:
        with ExitStack() as stack:
            opened = [readable(place, _shown) for place in options.run_directories]
            runs = [stack.enter_context(run)[0] for run in opened]
            if len(runs) == 1 and runs[0].home is None and options.output is not None:
                raise ValueError("--output is for several runs; the report of one lies in its directory")
            if len(runs) == 1:
                print(_kept(runs[0], build_report(runs[0]), options.output))
            else:
                beside = Path() if runs[0].home else runs[0].path.parent
                print(build_comparison(runs, options.output or beside / "compare.html"))
    except (ValueError, OSError) as error:
        print(f"rl-system report: {error}", file=sys.stderr)
        return exit_codes.BAD_INPUT
    return exit_codes.OK


def _shown(name: str) -> bool:
    return not name.startswith(("ready/", "tensorboard/", "logs/"))


def _kept(run: RunDirectory, page: Path, output: Path | None) -> Path:
    """Where the page of one run is; that of a copy is brought to a place that stays."""
    return page if run.home is None else Path(shutil.copy(page, output or f"{run.name}.html"))
