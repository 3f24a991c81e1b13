"""Guided generation, ours against the authors' second forward pass per sample: `python -m benchmarks.guidance`.

32 chains of the toy policy in one batch, one for each of 32 prompts, guidance 0.8, temperature 1, no top-k. The
authors' way is :mod:`benchmarks.authors_sampler`, which says what it leaves out in its own favour. Ours is
:class:`actors.reference_sampler.ReferenceSampler`. Rounds in turn, one process, the same number of threads. Texts are
sampled, so chains differ in length by a few ids, and rates are compared: ids written, to the end of each turn, a
second. Parsing the chains and decoding their images is the same code for both and takes the same time; it is measured
too, and ``ratio_with_images`` has it on both sides.

Three more sides say what costs what: ours with PURE's settings whole (greedy text, top-k that depends on the entropy),
ours without guidance, and the authors' way without guidance.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

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


@dataclasses.dataclass(frozen=True)
class Run:
    """Ids of each chain; seconds until they were there, and until the images were there too."""

    lengths: Lengths
    generation_s: float
    whole_s: float

    @property
    def rate(self) -> float:
        """Ids a second."""
        return sum(self.lengths) / self.generation_s

    @property
    def images_s(self) -> float:
        """Seconds of parsing and decoding."""
        return self.whole_s - self.generation_s


def run(rounds: int, threads: int) -> dict[str, Any]:
    """All figures."""
    config = load_config(["experiment=toy"])
    family = Family.from_pretrained(config.policy.path)
    model = VlcotForCausalLM.from_pretrained(config.policy.path, dtype=torch.float32, attn_implementation="sdpa").eval()
    tokenizer = ImageTokenizer.from_pretrained(config.policy.image_tokenizer)
    prompts = toy_prompts(BATCH)
    sampler = ReferenceSampler(model, family, tokenizer, group_size=1, temperature=1.0, max_new_tokens=MAX_NEW_TOKENS)

    def decoded(chains: list[list[int]]) -> Lengths:
        raw = [RawSample(c, [0.0] * len(c), (VersionSpan(0, 0, len(c)),), "stop") for c in chains]
        return [len(sample.ids) for sample in build_samples(family.builder, tokenizer, raw)]

    def ours(decoding: Decoding) -> Run:
        started = time.perf_counter()
        groups = sampler.generate_batch(prompts, [decoding] * BATCH)
        whole = time.perf_counter() - started
        return Run([len(s.ids) for group in groups for s in group.samples], groups[0].generation_s, whole)

    def theirs(guided: bool) -> Run:
        started = time.perf_counter()
        chains = sample(model, family, [p.ids for p in prompts], 1, MAX_NEW_TOKENS, guided=guided)
        generation = time.perf_counter() - started
        return Run(decoded(chains), generation, time.perf_counter() - started)

    sides: dict[str, Callable[[], Run]] = {
        "ours": functools.partial(ours, Decoding(guidance=GUIDANCE)),
        "authors": functools.partial(theirs, True),
        "ours_with_pure_settings": functools.partial(ours, PURE),
        "ours_without_guidance": functools.partial(ours, Decoding()),
        "authors_without_guidance": functools.partial(theirs, False),
    }
    torch.set_num_threads(threads)
    for name in ("ours", "authors_without_guidance"):  # first calls fill caches
        sides[name]()
    measured = [{name: side() for name, side in sides.items()} for _ in range(rounds)]

    def ratio(seconds: Callable[[Run], float]) -> float:
        """Median of ours over the authors' way, ids a second."""
        speeds = [[sum(m[name].lengths) / seconds(m[name]) for name in ("ours", "authors")] for m in measured]
        return round(statistics.median(ours / authors for ours, authors in speeds), 2)

    return {
        "machine": machine(),
        "threads": threads,
        "batch": BATCH,
        "guidance": GUIDANCE,
        "ratio": ratio(lambda run: run.generation_s),
        "ratio_with_images": ratio(lambda run: run.whole_s),
        "tokens_per_s": {name: round(statistics.median(m[name].rate for m in measured), 1) for name in sides},
        "tokens_per_chain": {
            name: round(statistics.mean(n for m in measured for n in m[name].lengths), 1) for name in sides
        },
        "images_s": {name: round(statistics.median(m[name].images_s for m in measured), 2) for name in sides},
        "rounds": [{name: round(run.rate, 1) for name, run in m.items()} for m in measured],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    output_option(parser, "guidance")
    args = parser.parse_args()
    write(args.output, run(args.rounds, args.threads))


if __name__ == "__main__":
    main()
