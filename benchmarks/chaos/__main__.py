"""Kill parts of toy runs with SIGKILL, and see whether each run keeps its promises: `python -m benchmarks.chaos`.

Each case is a run of its own (``experiment=toy``, every part real, short: see ``benchmarks/chaos/attempts.py``), and
one kill at a random moment of training: after a random step, and then a random part of a step, as the seed decides.

* A process of the run: a rollout actor, its vLLM engine, a learner rank, a replica of each reward server. There is one
  rollout actor and one replica of each, so nothing else can do its work; the run is to go on by itself.
* The driver: killed alone, with the Ray that it started in itself. The same command (``resume=auto``) follows at once.
* The coordinator's node: the head of a cluster of two nodes (of this machine), which has no CPUs, as in ``k8s/``; the
  driver runs beside it. GCS, raylet, everything below it and the driver are killed at once, as when that machine is
  lost. Without a head there is no cluster; as a RayJob would, the same command follows at once on a new one, while the
  processes on the old cluster's worker node still live.

Every run must end with exit code 0 at its target step, have trained the same multiset of row ids as an undisturbed run,
no group twice, with weights that were equal in learner and actors at the end and the bound on staleness kept.

Recovery is the time from the kill until work has been done that was begun after it and needs the killed part, *and*
after that a learner step was reported whose number is higher than any before the kill: a step that is made again counts
for nothing. For a rollout actor or its engine that work is a group whose generation began after the kill; for a reward
replica, the driver and the node it is such a group with its rewards. It must take less than 60 s.

A table is printed, and `benchmarks/results/chaos.json` written: cases that were not asked for keep their last result.
Exit code 1 if a promise was broken.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.chaos import cases, evidence
from benchmarks.chaos.attempts import TARGET, ChaosError
from benchmarks.chaos.cases import DRIVER, NAMES, NODE, Outcome, Setting

LIMIT_S = 60.0


def play(name: str, setting: Setting, rows: list[str]) -> Outcome:
    """One case, judged."""
    began = time.monotonic()
    try:
        if name == DRIVER:
            outcome, run = cases.killed_driver(setting)
        elif name == NODE:
            outcome, run = cases.killed_node(setting)
        else:
            outcome, run = cases.killed_part(name, setting)
    except ChaosError as error:
        outcome = Outcome(name, 0, 0.0, broken=[str(error)])
    else:
        outcome.broken += evidence.broken_promises(run, TARGET, rows)
        if outcome.recovery_s is None:
            outcome.broken.append("it did not recover")
        elif outcome.recovery_s > LIMIT_S:
            outcome.broken.append(f"recovery took {outcome.recovery_s:.1f} s")
        if missing := evidence.missing_metrics(run, TARGET.steps):
            outcome.notes.append(f"no metrics of step {', '.join(map(str, missing))}")
    outcome.wall_s = time.monotonic() - began
    return outcome


def show(outcomes: list[Outcome], console: Console) -> None:
    """Print the table, and below it what was broken and noted."""
    table = Table(title=f"SIGKILL in toy runs of {TARGET.steps} steps; seconds from the kill")
    for column in ("killed", "after step", "replaced", "works again", "recovered", "promises", "run"):
        table.add_column(column, justify="left" if column in ("killed", "promises") else "right", no_wrap=True)
    for o in outcomes:
        times = (_shown(o.replaced_s), _shown(o.works_s), _shown(o.recovery_s))
        table.add_row(o.case, str(o.step), *times, "BROKEN" if o.broken else "kept", _shown(o.wall_s))
    console.print(table)
    for o in outcomes:
        for text in (*(f"broken: {b}" for b in o.broken), *(f"noted: {n}" for n in o.notes)):
            console.print(f"{o.case}: {text}", markup=False, highlight=False, soft_wrap=True)


def _shown(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds:.1f}"


def write(outcomes: list[Outcome], seed: int, path: Path) -> None:
    """Put the outcomes into the results, in place of older ones of the same cases."""
    results = json.loads(path.read_text()) if path.exists() else {}
    machine = f"{platform.machine()}, {os.cpu_count()} cores"
    for outcome in outcomes:
        figures = {key: round(v, 2) if isinstance(v, float) else v for key, v in asdict(outcome).items()}
        results[outcome.case] = figures | {"seed": seed, "machine": machine}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({name: results[name] for name in NAMES if name in results}, indent=2) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES, metavar="CASE", help=", ".join(NAMES))
    parser.add_argument("--seed", type=int, default=0, help="of the moments at which something is killed")
    parser.add_argument("--train-seed", type=int, default=0, help="of the runs")
    parser.add_argument(
        "--folder",
        type=Path,
        help="keep the runs and their output; a finished undisturbed run there is used again",
    )
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/chaos.json"))
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what was started is ended then too
    console = Console(width=None if sys.stdout.isatty() else 110)
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory(prefix="chaos-", ignore_cleanup_errors=True) as temporary:
        folder = args.folder or Path(temporary) / "runs"
        folder.mkdir(parents=True, exist_ok=True)
        setting = Setting(folder, Path(temporary), args.train_seed, args.seed)
        console.print("an undisturbed run")
        try:
            rows = cases.undisturbed(setting)
        except ChaosError as error:
            print(error, file=sys.stderr)
            return 1
        for name in args.only:
            console.print(f"a run in which this is killed: {name}")
            outcomes.append(play(name, setting, rows))
            write(outcomes, args.seed, args.output)
    show(outcomes, console)
    return 1 if any(outcome.broken for outcome in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
