"""The whole loop against TRL's `GRPOTrainer`: `make bench-trl`, or `python -m benchmarks.trl_loop --trl DIR` after

    python -m pip install --no-deps --target DIR trl==1.16.0

TRL is put on the path of its own process only, so that the pinned set does not change; it runs on the transformers,
accelerate and datasets that are pinned here. Both sides train the same decoder from the same random weights, on the
same prompts (ids), with G samples of the same number of new tokens (nothing ends a chain before), KL to a frozen
reference, AdamW in float32 and a trivial reward, on the same cores.

* `vlcot`: the 7B's 73,728 ids and a VLCoT layout of 128 px: three images and some words between them.
* `text`: 2,048 ids, words only.

Ours is `rl-system train` whole, with only the format reward: a vLLM actor and two ZeRO-3 ranks with one thread each,
``max_staleness`` 1, weight push, run directory. Its rate is that of the steps between the first two and the last two,
since nothing is generated beside the last ones. TRL is one process with as many threads as there are cores, batched
`generate`, no gradient checkpointing; of its way with two threads or two processes and of several batch sizes this was
the fastest. TRL's steps after the first count. It runs before and after ours, and both rates are printed.

What is alike: prompts, samples, tokens, decoder. What is not, and is the point: TRL samples and trains on all ids,
ours on those that the grammar allows; ours samples the next steps while it trains; TRL's generation is transformers'.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.figures import machine, output_option, write
from benchmarks.random_family import (
    NEVER,
    REAL_CODES,
    REAL_SIZE,
    Width,
    real_table,
    small_table,
    write_image_tokenizer,
    write_policy,
)
from benchmarks.toy_run import train
from rl_system.data.prompts import PromptBuilder, training_prompts
from rl_system.data.rows import ToyPhotographs
from vlcot.policy.family import Family
from vlcot.sequence import Layout
from vlcot.tokenizer.image import ImageTokenizer

GROUP_SIZE, KL_BETA, LEARNING_RATE = 8, 0.04, 1e-6
INSTRUCTION = "restore: <|image|>"
SMALL_SIZE, SMALL_CODES = 2_048, 64
FIRST, LAST = 2, 2
"""Steps of ours at both ends that do not count: the pipeline fills, then empties."""


@dataclass(frozen=True)
class Workload:
    """What both sides train."""

    name: str
    groups_per_step: int
    new_tokens: int
    samples_at_once: int
    """Of TRL: per forward pass in training."""

    def write(self, folder: Path) -> Family:
        """Policy and image tokenizer."""
        if self.name == "vlcot":
            table, size, codes, layout = real_table(), REAL_SIZE, REAL_CODES, Layout(128, 8, 32)
            width, image_start = Width(hidden=128, layers=2, heads=2, positions=1024), 0.1
        else:
            table, size, codes = small_table(SMALL_SIZE, SMALL_CODES, (1, 2, 4)), SMALL_SIZE, SMALL_CODES
            layout, width, image_start = Layout(64, 8, 16), Width(hidden=256, layers=4, heads=4, positions=512), NEVER
        write_image_tokenizer(folder / "vq", codes)
        return write_policy(folder / "policy", table, size, layout, width, image_start)


WORKLOADS = (Workload("vlcot", 2, 416, 8), Workload("text", 4, 200, 16))


def trl_job(work: Workload, folder: Path, family: Family, steps: int) -> Path:
    """File that tells :mod:`benchmarks.trl_side` what to do."""
    builder = PromptBuilder(family, ImageTokenizer.from_pretrained(folder / "vq"), INSTRUCTION)
    prompts = training_prompts(ToyPhotographs(0), builder, 4096, seed=0)
    job = {
        "policy": str(folder / "policy"),
        "output_dir": str(folder / "trl"),
        "threads": os.cpu_count(),
        "group_size": GROUP_SIZE,
        "groups_per_step": work.groups_per_step,
        "samples_at_once": work.samples_at_once,
        "steps": steps,
        "new_tokens": work.new_tokens,
        "kl_beta": KL_BETA,
        "learning_rate": LEARNING_RATE,
        "prompts": [next(prompts).ids.tolist() for _ in range(steps * work.groups_per_step)],
    }
    path = folder / "job.json"
    path.write_text(json.dumps(job))
    return path


def run_trl(job: Path, trl: Path) -> dict[str, Any]:
    """What :mod:`benchmarks.trl_side` printed.

    Raises:
        RuntimeError: it failed.
    """
    path = os.pathsep.join([os.getcwd(), str(trl), os.environ.get("PYTHONPATH", "")])
    threads = str(os.cpu_count())
    ran = subprocess.run(
        [sys.executable, "-m", "benchmarks.trl_side", str(job)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": threads},
    )
    if ran.returncode:
        raise RuntimeError(f"TRL ended with {ran.returncode}: {ran.stderr[-2000:]}")
    return dict(json.loads(ran.stdout.splitlines()[-1]))


def run_ours(work: Workload, folder: Path, steps: int) -> dict[str, float]:
    """Groups a second, and where a step's time went."""
    run = train(
        folder,
        "ours",
        f"policy.path={folder / 'policy'}",
        f"policy.image_tokenizer={folder / 'vq'}",
        f'policy.instruction="{INSTRUCTION}"',
        f"rollout.group_size={GROUP_SIZE}",
        f"rollout.max_new_tokens={work.new_tokens}",
        *(f"reward.weights.{name}=0" for name in ("degradation", "understanding", "generation")),
        f"learner.steps={steps}",
        f"learner.groups_per_step={work.groups_per_step}",
        f"learner.learning_rate={LEARNING_RATE}",
        "learner.warmup_steps=0",
        "learner.checkpoint_every=0",
        f"grpo.kl_beta={KL_BETA}",
    )
    begin, end = run.window(FIRST, steps - LAST)
    count = steps - LAST - FIRST
    names = ("time/step", "time/generate", "time/train", "time/reference", "time/push_total", "idle/learner")
    names = (*names, "idle/actors", "throughput/sampled_tokens_per_s")
    return {
        "groups_per_s": round(count * work.groups_per_step / (end - begin), 4),
        "cpu_s_a_step": round(run.cpu_seconds((begin, end)) / count, 2),
        **{name: round(run.mean(name, FIRST, steps - LAST), 3) for name in names},
    }


def compare(work: Workload, trl: Path, steps: int, trl_steps: int) -> dict[str, Any]:
    """TRL, ours, TRL."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        family = work.write(folder)
        job = trl_job(work, folder, family, trl_steps)
        before = run_trl(job, trl)
        ours = run_ours(work, folder, steps)
        after = run_trl(job, trl)
        prompt = len(json.loads(job.read_text())["prompts"][0])
    for side in (before, after):
        if not side["shortest"] == side["longest"] == work.new_tokens:
            raise RuntimeError(f"TRL wrote {side['shortest']} to {side['longest']} tokens, not {work.new_tokens}")
    rates = [work.groups_per_step / statistics.median(side["step_s"][1:]) for side in (before, after)]
    rate = work.groups_per_step / statistics.median([*before["step_s"][1:], *after["step_s"][1:]])
    return {
        "vocabulary": family.vocabulary.size,
        "prompt_tokens": prompt,
        "new_tokens": work.new_tokens,
        "group_size": GROUP_SIZE,
        "groups_per_step": work.groups_per_step,
        "trl": {
            "version": before["version"],
            "groups_per_s": round(rate, 4),
            "before_and_after": [round(r, 4) for r in rates],
        },
        "ours": ours,
        "ratio": round(ours["groups_per_s"] / rate, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--trl", type=Path, required=True, help="directory that holds the package trl")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--trl-steps", type=int, default=3)
    output_option(parser, "trl_loop")
    args = parser.parse_args()
    if not (args.trl / "trl").is_dir():
        parser.error(f"--trl {args.trl}: there is no package trl; install it there as the docstring says")
    figures = {work.name: compare(work, args.trl.absolute(), args.steps, args.trl_steps) for work in WORKLOADS}
    write(args.output, {"machine": machine(), **figures})


if __name__ == "__main__":
    main()
