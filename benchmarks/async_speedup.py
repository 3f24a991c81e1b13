"""Asynchronous against synchronous, with slow rewards: `python -m benchmarks.async_speedup`.

Toy runs on this machine. One more reward answers after half of the time that a batch takes to generate, as a first,
short synchronous run without it measures. Then a synchronous run (``coordination.max_staleness=0``), an asynchronous
one and a synchronous one again, all with the delay; the first steps and, in asynchronous runs, the last ones, beside
which nothing is generated, do not count.

**What asynchrony can gain here.** In the synchronous run nothing overlaps between batches, so its step is the sum of
its stages: generation G (some rollout is open), learner L (training step and push), and R, the rest: the rewards, the
delay in them, and the driver. An asynchronous step cannot be shorter than

* L or G, since each is a stage that serves one batch after the other. Both are measured while the other rests, so with
  the cores to itself. G may in truth shrink where the groups of several batches are generated together, which uses
  vLLM better; it is therefore scaled by the ratio of the CPU seconds of a step, asynchronous to synchronous, where
  that is below 1;
* W / C: work conservation. W is the CPU time that all processes of the run use in a step, C the number of cores.
  Stages that overlap share the cores, and a delay is the only thing that costs none. The smaller W of the two runs
  is taken, as the bound that is harder to reach;
* (G + R + L) / (max_staleness + 1): a group holds its slot from admission until its batch is trained, and there are
  slots for ``max_staleness + 1`` batches.

The bound on the speed-up is the synchronous step over the largest of these; ``reached`` is the measured speed-up as a
share of it. Caches and memory are shared too, which the bound leaves out. The KL reference is left out, as in
``benchmarks.reward_hiding``: with it the learner alone fills both cores and there is little to hide anything behind.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.figures import machine, output_option, write
from benchmarks.toy_run import ToyRun, slow_reward, train
from rl_system.coordination.meter import covered

METRICS = ("idle/learner", "idle/actors", "reward_hidden", "time/step")


def figures_of(run: ToyRun, before: int, last: int) -> dict[str, float]:
    """Means over the steps after ``before``, up to ``last``; times in seconds a step."""
    window = run.window(before, last)
    steps = last - before
    learner = run.mean("time/learner_step", before, last) - run.mean("time/wait_batch", before, last)
    return {
        "step_s": (window[1] - window[0]) / steps,
        "generation_s": covered(window, run.intervals("rollout")) / steps,
        "learner_s": learner,
        "cpu_s": run.cpu_seconds(window) / steps,
        **{name: run.mean(name, before, last) for name in METRICS},
    }


def bound(
    synchronous: dict[str, float], asynchronous: dict[str, float], staleness: int, cores: int
) -> dict[str, float]:
    """The shortest asynchronous step that the stage times allow, by each reason (docstring of the module)."""
    generation, learner = synchronous["generation_s"], synchronous["learner_s"]
    cheaper = min(1.0, asynchronous["cpu_s"] / synchronous["cpu_s"])
    return {
        "generation": generation * cheaper,
        "learner": learner,
        "cores": min(synchronous["cpu_s"], asynchronous["cpu_s"]) / cores,
        "slots": synchronous["step_s"] / (staleness + 1),
    }


def run(steps: int, staleness: int) -> dict[str, Any]:
    """All figures."""
    first, cores = 2, os.cpu_count() or 1
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)

        def toy(label: str, count: int, stale: int, *overrides: str) -> ToyRun:
            settings = (f"learner.steps={count}", f"coordination.max_staleness={stale}", "grpo.kl_beta=0")
            return train(folder, label, *settings, "learner.checkpoint_every=0", *overrides)

        delay = figures_of(toy("calibration", 5, 0), first - 1, 5)["generation_s"] / 2
        slow = slow_reward(delay)
        before = figures_of(toy("before", steps, 0, slow), first, steps)
        asynchronous = figures_of(
            toy("asynchronous", steps + 2 * staleness, staleness, slow), first + staleness, steps + staleness
        )
        after = figures_of(toy("after", steps, 0, slow), first, steps)
    synchronous = {key: statistics.mean((before[key], after[key])) for key in before}
    shortest = bound(synchronous, asynchronous, staleness, cores)
    speedup = synchronous["step_s"] / asynchronous["step_s"]
    allowed = synchronous["step_s"] / max(shortest.values())
    return {
        "machine": machine(),
        "max_staleness": staleness,
        "injected_delay_s": round(delay, 2),
        "synchronous": _rounded(synchronous),
        "synchronous_steps_s": [round(before["step_s"], 3), round(after["step_s"], 3)],
        "asynchronous": _rounded(asynchronous),
        "shortest_step_s": _rounded(shortest),
        "bound_by": max(shortest, key=shortest.__getitem__),
        "speedup": round(speedup, 3),
        "speedup_allowed": round(allowed, 3),
        "reached": round(speedup / allowed, 3),
    }


def _rounded(values: dict[str, float]) -> dict[str, float]:
    return {key: round(value, 3) for key, value in values.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=10, help="of the synchronous runs")
    parser.add_argument("--max-staleness", type=int, default=3)
    output_option(parser, "async_speedup")
    args = parser.parse_args()
    if args.steps < 4 or args.max_staleness < 1:
        parser.error("--steps must be at least 4 and --max-staleness at least 1")
    write(args.output, run(args.steps, args.max_staleness))


if __name__ == "__main__":
    main()
