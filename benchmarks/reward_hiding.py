"""How much of the reward time hides behind generation: `python -m benchmarks.reward_hiding`.

A toy run whose rewards are made slow on purpose: one more server answers after half of the time that a group takes to
generate, measured in a first, short run. Hidden is the time in which a group waits for its rewards while the rollout
actors generate others, as the two runs' time lines say; the first and the last step are left out, since there is
nothing before and after them to hide behind. Rewards can only hide behind generation where generation is what a run
waits for, as on a cluster: on two shared cores the learner leaves out the KL reference for that, and the shares of the
time in which each part was at work are printed too.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

from benchmarks.figures import machine, output_option, write
from benchmarks.toy_run import ToyRun, slow_reward, train
from rl_system.coordination.meter import covered, hidden_share


def hidden(run: ToyRun) -> dict[str, float]:
    """Share of the reward time behind generation, and means in seconds."""
    steps = sorted(run.intervals("learner"))
    begin, end = steps[0][1], steps[-2][1]
    generations = run.intervals("rollout")
    rewards = [i for i in run.intervals("rewards") if i[0] >= begin and i[1] <= end]
    return {
        "hidden": round(hidden_share(rewards, generations), 3),
        "generation_busy": round(covered((begin, end), generations) / (end - begin), 3),
        "learner_busy": round(covered((begin, end), steps) / (end - begin), 3),
        "groups": len(rewards),
        "generation_s": round(statistics.mean(b - a for a, b in generations), 2),
        "reward_s": round(statistics.mean(b - a for a, b in rewards), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--max-staleness", type=int, default=3)
    output_option(parser, "reward_hiding")
    args = parser.parse_args()
    common = (f"coordination.max_staleness={args.max_staleness}", "grpo.kl_beta=0")
    with tempfile.TemporaryDirectory() as folder:
        usual = hidden(train(Path(folder), "usual", f"learner.steps={args.steps}", *common))
        delay = usual["generation_s"] / 2
        delayed = hidden(train(Path(folder), "delayed", f"learner.steps={args.steps}", *common, slow_reward(delay)))
    figures = {
        "machine": machine(),
        "max_staleness": args.max_staleness,
        "usual": usual,
        "injected_delay_s": round(delay, 2),
        "delayed": delayed,
    }
    write(args.output, figures)


if __name__ == "__main__":
    main()
