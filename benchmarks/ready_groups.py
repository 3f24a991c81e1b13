"""What a resumed run saves by the groups that were ready: `python -m benchmarks.ready_groups`.

A toy run (those of ``make chaos``: two groups a step, staleness 1, a checkpoint every second step) is ended once the
batch of step 4 is with the learner. Then it goes on twice from the same copy of its directory: with its stored groups,
and with that folder emptied. Timed is from the begin of training, when everything has started, to the first and the
second step.
"""

from __future__ import annotations

import argparse
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.chaos.attempts import LONGEST_S, SETTINGS, Attempt, kill_at_once
from benchmarks.figures import machine, output_option, write
from rl_system.runs.files import read_json_lines
from rl_system.runs.sinks import read_metrics

NAME, STEP, NEW_STEPS = "run", 4, 2
SIGNALS = {"SIGKILL": signal.SIGKILL, "SIGTERM": signal.SIGTERM}


def end_run(folder: Path, number: signal.Signals) -> None:
    """Start a run and end it while the learner has the batch of ``STEP``."""
    with Attempt(folder, NAME, 0) as attempt:
        journal = attempt.run / "journal.jsonl"
        attempt.wait_until(lambda: len(list(read_json_lines(journal))) >= STEP, LONGEST_S, f"batch {STEP}", 0.02)
        if number is signal.SIGKILL:
            kill_at_once(attempt)
        else:
            attempt.process.send_signal(number)
            attempt.end()


def go_on(folder: Path) -> dict[str, Any]:
    """Seconds to the first steps of the next attempt, and how many of their groups it did not make."""
    log = folder / f"{NAME}.log"
    log.write_text("")
    with Attempt(folder, NAME, 0) as attempt:
        attempt.wait_until(lambda: "training" in log.read_text().splitlines(), LONGEST_S, "it trains", 0.02)
        began, done = time.time(), attempt.step()
        attempt.wait_for_step(done + NEW_STEPS)
        steps = [metrics for metrics in read_metrics(attempt.run / "metrics.jsonl") if metrics.step > done]
    return {
        "behind_step": done,
        "step_s": [round(metrics.time_s - began, 2) for metrics in steps[:NEW_STEPS]],
        "groups_reused": [int(metrics.values["groups/reused"]) for metrics in steps[:NEW_STEPS]],
    }


def compare(folder: Path, number: signal.Signals) -> dict[str, Any]:
    """One way to end, both ways to go on."""
    folder.mkdir()
    end_run(folder, number)
    run, copy = folder / NAME, folder / "copy"
    shutil.copytree(run, copy, symlinks=True)
    stored = list((run / "ready").glob("*.group"))
    outcome: dict[str, Any] = {"stored": len(stored), "stored_bytes": sum(path.stat().st_size for path in stored)}
    outcome["with"] = go_on(folder)
    shutil.rmtree(run)
    copy.rename(run)
    for path in (run / "ready").iterdir():
        path.unlink()
    outcome["without"] = go_on(folder)
    return outcome


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=SIGNALS, default=list(SIGNALS))
    output_option(parser, "ready_groups")
    args = parser.parse_args()
    figures: dict[str, Any] = {"machine": machine(), "settings": SETTINGS}
    with tempfile.TemporaryDirectory() as folder:
        for name in args.only:
            figures[name] = compare(Path(folder) / name, SIGNALS[name])
            write(args.output, figures)
    return 0


if __name__ == "__main__":
    sys.exit(main())
