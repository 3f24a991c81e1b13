"""Generation, rollout actor against the authors' way: `python -m benchmarks.generation`.

64 chains of the toy policy, 8 prompts of 8 samples, from the same prompts; the actor's engine is started once and
waits while the others run, rounds in turn. The engine has as many threads as there are cores; the others have one, with
which they are faster (``--others-threads 2``, two cores: the authors' way writes 226 ids a second instead of 550). Each
chain has the same three images; the texts between them are sampled and differ in length by a few ids, so rates are
compared: ids written, to the end of each turn, a second. Every side ends with parsed chains and decoded images; the
share of the actor's time in which its engine was at work is printed too.

The ratio that is asked for is against the authors' way whole (:mod:`benchmarks.authors_sampler`). The actor has no
guidance, since the learner's log-probs would then not be those of the sampler; so three more sides say where the
factor comes from: without the second forward pass, then also with the grammar's mask for all samples at once, which
leaves vLLM against `generate`.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import os
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from actors.rollout_actor import RolloutActor
from actors.samples import RawSample, build_samples
from actors.spec import RolloutSpec
from benchmarks.authors_sampler import sample
from benchmarks.figures import machine, output_option, write
from rl_system import assembly
from rl_system.config.compose import load_config
from rl_system.data.prompts import PromptBuilder, training_prompts
from vlcot.groups import Prompt, VersionSpan
from vlcot.policy.family import Family
from vlcot.policy.model import VlcotForCausalLM
from vlcot.tokenizer.image import ImageTokenizer

GROUPS, GROUP_SIZE, MAX_NEW_TOKENS = 8, 8, 320
Lengths = list[int]


def toy_prompts(count: int) -> list[Prompt]:
    """The first training prompts of the toy experiment."""
    config = load_config(["experiment=toy"])
    family = Family.from_pretrained(config.policy.path)
    builder = PromptBuilder(
        family, ImageTokenizer.from_pretrained(config.policy.image_tokenizer), config.policy.instruction
    )
    prompts = training_prompts(assembly.row_source(config), builder, config.data.train_rows, seed=0)
    return [next(prompts) for _ in range(count)]


async def actor_lengths(actor: RolloutActor, prompts: Sequence[Prompt]) -> Lengths:
    """All groups at the same time; ids of each chain."""
    groups = await asyncio.gather(*(actor.generate(prompt) for prompt in prompts))
    return [len(sample.ids) for group in groups for sample in group.samples]


def rate(lengths: Callable[[], Lengths]) -> tuple[float, float]:
    """Ids a second, and the mean ids of a chain."""
    started = time.perf_counter()
    found = lengths()
    return sum(found) / (time.perf_counter() - started), statistics.mean(found)


def run(rounds: int, threads: int, others_threads: int) -> dict[str, Any]:
    """All figures."""
    config = load_config(["experiment=toy"])
    spec = RolloutSpec(
        policy=config.policy.path,
        image_tokenizer=config.policy.image_tokenizer,
        group_size=GROUP_SIZE,
        max_new_tokens=MAX_NEW_TOKENS,
        max_num_seqs=GROUPS * GROUP_SIZE,
        kv_cache_gib=0.5,
        threads=threads,
    )
    prompts = toy_prompts(GROUPS)
    family = Family.from_pretrained(spec.policy)
    model = VlcotForCausalLM.from_pretrained(spec.policy, dtype=torch.float32, attn_implementation="sdpa").eval()
    tokenizer = ImageTokenizer.from_pretrained(spec.image_tokenizer)
    loop = asyncio.new_event_loop()
    actor = RolloutActor(spec, 0)

    def ours() -> Lengths:
        return loop.run_until_complete(actor_lengths(actor, prompts))

    def theirs(prompts_at_once: int, guided: bool, per_sample_grammar: bool) -> Lengths:
        batches = [prompts[i : i + prompts_at_once] for i in range(0, GROUPS, prompts_at_once)]
        options = {"guided": guided, "per_sample_grammar": per_sample_grammar}
        chains = [
            chain
            for batch in batches
            for chain in sample(model, family, [p.ids for p in batch], GROUP_SIZE, MAX_NEW_TOKENS, **options)
        ]
        raw = [RawSample(c, [0.0] * len(c), (VersionSpan(0, 0, len(c)),), "stop") for c in chains]
        return [len(sample.ids) for sample in build_samples(family.builder, tokenizer, raw)]

    sides: dict[str, Callable[[], Lengths]] = {
        "rollout_actor": ours,
        "authors": functools.partial(theirs, 1, True, True),
        "authors_64_in_a_batch": functools.partial(theirs, GROUPS, True, True),
        "authors_64_without_guidance": functools.partial(theirs, GROUPS, False, True),
        "generate_64_with_batched_mask": functools.partial(theirs, GROUPS, False, False),
    }
    try:
        loop.run_until_complete(actor.ready())
        torch.set_num_threads(others_threads)  # of this process; the engine has its own
        for name in ("rollout_actor", "authors_64_without_guidance"):  # first calls compile and fill caches
            sides[name]()
        busy_before = loop.run_until_complete(actor.statistics())["busy_s"]
        measured = [{name: rate(side) for name, side in sides.items()} for _ in range(rounds)]
        busy = loop.run_until_complete(actor.statistics())["busy_s"] - busy_before
    finally:
        actor.shutdown()
        loop.run_until_complete(asyncio.sleep(0.1))  # lets vLLM's own tasks end before their loop does
        loop.close()
    threads_of = {"rollout_actor": threads, "others": others_threads}
    return _figures(measured, threads_of) | {"engine_s_a_round": round(busy / rounds, 2)}


def _figures(measured: list[dict[str, tuple[float, float]]], threads: dict[str, int]) -> dict[str, Any]:
    names = list(measured[0])
    return {
        "machine": machine(),
        "threads": threads,
        "sequences": GROUPS * GROUP_SIZE,
        "tokens_per_s": {name: round(statistics.median(m[name][0] for m in measured), 1) for name in names},
        "tokens_per_chain": {name: round(statistics.mean(m[name][1] for m in measured), 1) for name in names},
        "ratio": {
            name: round(statistics.median(m["rollout_actor"][0] / m[name][0] for m in measured), 2)
            for name in names
            if name != "rollout_actor"
        },
        "rounds": [{name: round(value[0], 1) for name, value in m.items()} for m in measured],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--others-threads", type=int, default=1)
    output_option(parser, "generation")
    args = parser.parse_args()
    write(args.output, run(args.rounds, args.threads, args.others_threads))


if __name__ == "__main__":
    main()
