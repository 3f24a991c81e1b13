"""Whether a run that is stopped and goes on is the undisturbed run, bit for bit: `python -m benchmarks.exact_resume`.

Toy runs with ``coordination.max_staleness=0``, float32, one thread for each engine, a checkpoint every step. One
is left alone. Each of the others is ended at the begin of another phase of its second step and started again with
``resume=auto``: SIGTERM while it generates, SIGKILL of the driver once the batch is with the learner, and once the step
is reported. Compared are the trained rows, every metric of every step that is no time, and the bytes of the final
weights.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.figures import machine, output_option, write

STEPS = 4
SETTINGS = [
    "experiment=toy",
    "coordination.max_staleness=0",
    "resume=auto",
    f"learner.steps={STEPS}",
    "learner.groups_per_step=4",
    "learner.checkpoint_every=1",
    "learner.warmup_steps=0",
    "evaluation.prompts=2",
    "evaluation.pictures=1",
]
MOMENTS = {
    "generating": ("metrics.jsonl", 1, signal.SIGTERM),
    "training": ("journal.jsonl", 2, signal.SIGKILL),
    "reported": ("metrics.jsonl", 2, signal.SIGKILL),
}
"""Name -> the file whose so-manieth line is the moment, and the signal."""
LIMIT_S = 300.0
REUSED = "groups/reused"


def start(folder: Path, name: str) -> subprocess.Popen[bytes]:
    """A run, or the next attempt of it; what it prints goes to a file beside it."""
    command = [sys.executable, "-m", "rl_system", "train", *SETTINGS, f"output_dir={folder}", f"name={name}"]
    with (folder / f"{name}.log").open("ab") as log:
        environment = os.environ | {"RAY_AUTH_MODE": "disabled", "HF_HUB_OFFLINE": "1"}
        return subprocess.Popen(command, stdout=log, stderr=log, env=environment)


def finish(folder: Path, name: str) -> None:
    """Run to the end.

    Raises:
        RuntimeError: it failed.
    """
    if code := start(folder, name).wait(LIMIT_S):
        raise RuntimeError(f"run {name} ended with {code}: {(folder / f'{name}.log').read_text()[-3000:]}")


def interrupt(folder: Path, name: str) -> None:
    """Start a run and end it at its moment.

    Raises:
        RuntimeError: it ended before.
    """
    file, lines, number = MOMENTS[name]
    process = start(folder, name)
    path, deadline = folder / name / file, time.monotonic() + LIMIT_S
    while not path.exists() or len(path.read_text().splitlines()) < lines:
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"run {name} did not come to line {lines} of {file}")
        time.sleep(0.01)
    process.send_signal(number)
    process.wait(LIMIT_S)


def found(run: Path) -> dict[str, Any]:
    """What two equal runs have in common; whether a group was made by an earlier attempt is none of it."""
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    timeless = [{k: v for k, v in step.items() if not _of_time(k) and k != REUSED} for step in metrics]
    rows = [json.loads(line)["rows"] for line in (run / "journal.jsonl").read_text().splitlines()]
    weights = run / "checkpoints" / run.name / "policy" / "model.safetensors"
    return {"rows": rows, "metrics": timeless, "weights": hashlib.sha256(weights.read_bytes()).hexdigest()}


def _of_time(key: str) -> bool:
    return key.startswith(("time/", "idle/", "throughput/")) or key in ("time_s", "reward_hidden")


def differences(run: dict[str, Any], undisturbed: dict[str, Any]) -> list[str]:
    """What differs, by name."""
    told = [kind for kind in ("rows", "weights") if run[kind] != undisturbed[kind]]
    for ours, theirs in zip(run["metrics"], undisturbed["metrics"], strict=True):
        keys = sorted(ours.keys() | theirs.keys())
        told += [f"step {theirs['step']}: {key}" for key in keys if ours.get(key) != theirs.get(key)]
    return told


def run(folder: Path) -> dict[str, Any]:
    """All figures."""
    finish(folder, "undisturbed")
    undisturbed = found(folder / "undisturbed")
    outcome, reused = {}, {}
    for name in MOMENTS:
        interrupt(folder, name)
        finish(folder, name)
        outcome[name] = differences(found(folder / name), undisturbed)
        reused[name] = json.loads((folder / name / "summary.json").read_text())["groups_reused"]
    return {
        "machine": machine(),
        "steps": STEPS,
        "metrics_a_step": len(undisturbed["metrics"][0]),
        "losses": [step["grpo/loss"] for step in undisturbed["metrics"]],
        "weights": undisturbed["weights"],
        "groups_reused": reused,
        "differences": outcome,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, help="keeps the runs")
    output_option(parser, "exact_resume")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        figures = run(folder)
    write(args.output, figures)
    return int(any(figures["differences"].values()))


if __name__ == "__main__":
    sys.exit(main())
