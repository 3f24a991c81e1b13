"""The model of `rl-system simulate` against toy runs on this machine: `python -m benchmarks.scaling`.

The costs are fitted to one synchronous run. The step times of six others are predicted with them: two asynchronous
ones with the same groups per step; a synchronous and an asynchronous one with half as many; and again with a further
reward that answers after some seconds without using a core, so that not everything waits for the two cores. Of those
runs the prediction knows the setting, the delay, the number of steps, how long chains are, how long a push takes and
how late the learner came up. About three minutes a run on two cores. Two figures of the 7B estimates are measured as
well: how fast the image tokenizer of its size runs on one thread, and checksums.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import JanusVQVAEConfig
from transformers.models.janus.modeling_janus import JanusVQVAE

from benchmarks.figures import machine, output_option, write
from benchmarks.toy_run import slow_reward, train
from rl_system.runs.directory import RunDirectory
from rl_system.studies.scaling.calibration import fit, simulated
from rl_system.studies.scaling.measured import MeasuredRun, read_run
from vlcot.weights import checksum

DELAY_S = 4.0
FITTED = (0, 8, 0.0)
PREDICTED = ((1, 8, 0.0), (3, 8, 0.0), (0, 4, 0.0), (1, 4, 0.0), (0, 8, DELAY_S), (1, 8, DELAY_S))
"""max_staleness, groups_per_step, and the seconds of a further reward."""


def measure(folder: Path, steps: int, staleness: int, groups: int, delay_s: float) -> MeasuredRun:
    """A toy run in ``folder``; one that is there already is taken as it is.

    Raises:
        RuntimeError: it failed.
    """
    path = folder / (f"s{staleness}g{groups}" + (f"d{delay_s:g}" if delay_s else ""))
    if not path.exists():
        setting = [f"coordination.max_staleness={staleness}", f"learner.groups_per_step={groups}"]
        setting += [slow_reward(delay_s)] if delay_s else []
        train(folder, path.name, f"learner.steps={steps}", "learner.checkpoint_every=0", *setting)
    return read_run(RunDirectory.open(path))


def comparison(folder: Path, steps: int) -> dict[str, Any]:
    """Costs from one run, and what they predict of the others."""
    cores = len(os.sched_getaffinity(0))
    costs = fit([measure(folder, steps, *FITTED)], cores)
    rows = []
    for setting in (FITTED, *PREDICTED):
        run, delay_s = measure(folder, steps, *setting), setting[-1]
        outcome = simulated(costs, run, cores, delay_s)
        rows.append(
            {
                "fitted": setting is FITTED,
                "delay_s": delay_s,
                "measured": asdict(run),
                "model": {
                    "step_s": round(outcome.step_s, 3),
                    "generation_s": round(outcome.generation_s, 3),
                    "reward_s": round(outcome.reward_s, 3),
                    "train_s": round(outcome.train_s, 3),
                },
                "step_error": round(outcome.step_s / run.step_s - 1, 3),
            }
        )
    return {"cores": cores, "costs": asdict(costs), "runs": rows}


def image_tokenizer() -> dict[str, float]:
    """FLOPs of LlamaGen's VQ-8 for 512 px, and its speed on one thread, taken at 256 px with random weights."""
    config = JanusVQVAEConfig(
        base_channels=128,
        channel_multiplier=[1, 2, 2, 4],
        embed_dim=8,
        num_embeddings=16384,
        latent_channels=256,
        num_res_blocks=2,
    )
    torch.set_num_threads(1)
    with torch.device("meta"):
        shapes = JanusVQVAE(config)
    model = JanusVQVAE(config).eval()

    def encode(vq: JanusVQVAE, side: int, device: str) -> Callable[[], Any]:
        return lambda: vq.quant_conv(vq.encoder(torch.zeros(1, 3, side, side, device=device)))

    def decode(vq: JanusVQVAE, side: int, device: str) -> Callable[[], Any]:
        return lambda: vq.decoder(vq.post_quant_conv(torch.zeros(1, 8, side // 8, side // 8, device=device)))

    seconds = _seconds(encode(model, 256, "cpu")) + _seconds(decode(model, 256, "cpu"))
    flops = _flops(encode(shapes, 256, "meta")) + _flops(decode(shapes, 256, "meta"))
    return {
        "encoder_flops_512": _flops(encode(shapes, 512, "meta")),
        "decoder_flops_chain": sum(_flops(decode(shapes, side, "meta")) for side in (128, 256, 512)),
        "flops_per_s_of_one_thread": round(flops / seconds / 1e9) * 1e9,
    }


@torch.no_grad()
def _flops(call: Callable[[], Any]) -> float:
    with FlopCounterMode(display=False) as counter:
        call()
    return float(counter.get_total_flops())


@torch.no_grad()
def _seconds(call: Callable[[], Any]) -> float:
    """Of the second call."""
    call()
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def checksum_speed() -> float:
    """Bytes per second of one core (``vlcot.weights.checksum``)."""
    data = torch.randint(256, (1 << 28,), dtype=torch.uint8)
    return round(data.numel() / _seconds(lambda: checksum(data)) / 1e8) * 1e8


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=14)
    parser.add_argument("--runs", type=Path, help="folder of the runs, to keep them or to use those that are there")
    output_option(parser, "scaling")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        compared = comparison(args.runs or Path(temporary), args.steps)
    figures = {
        "machine": machine(),
        "toy": compared,
        "image_tokenizer": image_tokenizer(),
        "checksum_bytes_per_s": checksum_speed(),
    }
    write(args.output, figures)


if __name__ == "__main__":
    main()
