"""Guided generation, ours against the authors' second forward pass per sample: `python -m benchmarks.guidance`.

32 chains of the toy policy in one batch, one for each of 32 prompts, guidance 0.8, temperature 1, no top-k. The
authors' way is :mod:`benchmarks.authors_sampler`, which says what it leaves out in its own favour. Ours is
:class:`actors.reference_sampler.ReferenceSampler`. Rounds in turn, one process. Texts are sampled, so chains differ in
length by a few ids, and rates are compared: ids written, to the end of each turn, a second. Each side has one thread,
with which the authors' way is faster than with two (:mod:`benchmarks.generation`); ``all_cores`` is ours with as many
threads as there are cores.

Decoding the images is the same code for both and takes the same time; it is left out of ``ratio`` and is in
``ratio_with_images``. The ``cpu`` figures count seconds of the process instead of the wall's: with one thread they are
the same on a quiet machine, and those to look at on one that others use too; with more they add up the threads.
Figures are written after every round.

Three more sides say what costs what: ours with PURE's settings whole (greedy text, top-k that depends on the entropy),
ours without guidance, and the authors' way without guidance.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import os
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from actors.decoding import PURE, Decoding
from actors.reference_sampler import ReferenceSampler
from actors.samples import RawSample, build_samples
from benchmarks.authors_sampler import GUIDANCE, sample
from benchmarks.figures import machine, output_option, write
from benchmarks.generation import MAX_NEW_TOKENS, Lengths, toy_prompts
from rl_system.config.compose import load_config
from vlcot.groups import VersionSpan
from vlcot.policy.family import Family
from vlcot.policy.model import VlcotForCausalLM
from vlcot.tokenizer.image import ImageTokenizer

BATCH = 32


def now() -> np.ndarray:
    """Seconds of the wall's clock and of this process."""
    return np.array([time.perf_counter(), time.process_time()])


class TimedDecoder:
    """The image tokenizer's decoder; ``seconds`` is what it took since it was last set to zero, as in :func:`now`."""

    def __init__(self, tokenizer: ImageTokenizer) -> None:
        self._tokenizer = tokenizer
        self.seconds = np.zeros(2)

    def decode(self, codes: np.ndarray) -> torch.Tensor:
        started = now()
        pixels = self._tokenizer.decode(codes)
        self.seconds = self.seconds + now() - started
        return pixels


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """Ids of each chain; seconds of everything, and of decoding the images, as in :func:`now`."""

    lengths: Lengths
    whole: np.ndarray
    images: np.ndarray

    @property
    def rates(self) -> np.ndarray:
        """Ids a second without images and with them, each by both clocks: [2, 2]."""
        return sum(self.lengths) / np.stack([self.whole - self.images, self.whole])


def sides() -> dict[str, Callable[[], Run]]:
    """What is measured, by name."""
    config = load_config(["experiment=toy"])
    family = Family.from_pretrained(config.policy.path)
    model = VlcotForCausalLM.from_pretrained(config.policy.path, dtype=torch.float32, attn_implementation="sdpa").eval()
    decoder = TimedDecoder(ImageTokenizer.from_pretrained(config.policy.image_tokenizer))
    prompts = toy_prompts(BATCH)
    sampler = ReferenceSampler(model, family, decoder, group_size=1, temperature=1.0, max_new_tokens=MAX_NEW_TOKENS)

    def ours(decoding: Decoding) -> Lengths:
        groups = sampler.generate_batch(prompts, [decoding] * BATCH)
        return [len(sample.ids) for group in groups for sample in group.samples]

    def theirs(guided: bool) -> Lengths:
        chains = sample(model, family, [p.ids for p in prompts], 1, MAX_NEW_TOKENS, guided=guided)
        raw = [RawSample(c, [0.0] * len(c), (VersionSpan(0, 0, len(c)),), "stop") for c in chains]
        return [len(sample.ids) for sample in build_samples(family.builder, decoder, raw)]

    def timed(side: Callable[[], Lengths], threads: int) -> Run:
        torch.set_num_threads(threads)
        decoder.seconds = np.zeros(2)
        started = now()
        lengths = side()
        return Run(lengths, now() - started, decoder.seconds)

    guided = functools.partial(ours, Decoding(guidance=GUIDANCE))
    one_thread: dict[str, Callable[[], Lengths]] = {
        "ours": guided,
        "authors": functools.partial(theirs, True),
        "ours_with_pure_settings": functools.partial(ours, PURE),
        "ours_without_guidance": functools.partial(ours, Decoding()),
        "authors_without_guidance": functools.partial(theirs, False),
    }
    calls = {name: functools.partial(timed, call, 1) for name, call in one_thread.items()}
    return calls | {"ours_all_cores": functools.partial(timed, guided, os.cpu_count() or 1)}


def figures(measured: list[dict[str, Run]]) -> dict[str, Any]:
    """Medians over the rounds so far."""
    one, all_cores = (
        np.median([m[name].rates / m["authors"].rates for m in measured], axis=0).round(2).tolist()
        for name in ("ours", "ours_all_cores")
    )
    rates = {name: np.median([m[name].rates[0] for m in measured], axis=0).round(1) for name in measured[0]}
    images = {name: np.median([m[name].images for m in measured], axis=0).round(2) for name in measured[0]}
    return {
        "machine": machine(),
        "batch": BATCH,
        "guidance": GUIDANCE,
        "ratio": {"one_thread": one[0][0], "one_thread_cpu": one[0][1], "all_cores": all_cores[0][0]},
        "ratio_with_images": {"one_thread": one[1][0], "one_thread_cpu": one[1][1], "all_cores": all_cores[1][0]},
        "tokens_per_s": {name: {"wall": rate[0], "cpu": rate[1]} for name, rate in rates.items()},
        "tokens_per_chain": {
            name: round(float(np.mean([m[name].lengths for m in measured])), 1) for name in measured[0]
        },
        "images_s": {name: {"wall": seconds[0], "cpu": seconds[1]} for name, seconds in images.items()},
        "rounds": [{name: run.rates[0].round(1).tolist() for name, run in m.items()} for m in measured],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    output_option(parser, "guidance")
    args = parser.parse_args()
    measured_sides = sides()
    measured_sides["ours_with_pure_settings"]()  # the first call fills caches
    measured: list[dict[str, Run]] = []
    for _ in range(args.rounds):
        measured.append({name: side() for name, side in measured_sides.items()})
        write(args.output, figures(measured))


if __name__ == "__main__":
    main()
