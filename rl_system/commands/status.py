"""``rl-system status``: what a run is doing, from the files that it writes."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable

from rl_system.commands import exit_codes
from rl_system.runs.directory import RunDirectory

SHOWN = ("config.yaml", "status.json", "live.json", "attempts.jsonl", "metrics.jsonl")
"""Files that the table is made of."""


def run(args: list[str]) -> int:
    """Print the table; returns the exit code: 0 done, 2 ``RUN_DIRECTORY`` is no run, 130 interrupted."""
    from rl_system.runs.keeping import readable

    parser = argparse.ArgumentParser("rl-system status", description="What a run is doing, or how it ended.")
    parser.add_argument("run_directory", metavar="RUN_DIRECTORY", help="for example runs/toy, or a URI")
    parser.add_argument("--watch", action="store_true", help="again every two seconds, until the run ends or Ctrl-C")
    options = parser.parse_args(args)
    try:
        with readable(options.run_directory, SHOWN.__contains__) as (directory, update):
            _show(directory, update, options.watch)
    except ValueError as error:
        print(f"rl-system status: {error}", file=sys.stderr)
        return exit_codes.BAD_INPUT
    except KeyboardInterrupt:
        return exit_codes.INTERRUPTED
    return exit_codes.OK


def _show(directory: RunDirectory, update: Callable[[], None], watch: bool) -> None:
    from rich.console import Console
    from rich.live import Live

    from rl_system.runs.status import LOOK_S, status_view

    if not watch:
        Console(soft_wrap=True).print(status_view(directory, time.time()))
        return
    with Live(status_view(directory, time.time()), auto_refresh=False) as view:
        while directory.status().get("state") == "running":
            time.sleep(LOOK_S)
            update()
            view.update(status_view(directory, time.time()), refresh=True)
