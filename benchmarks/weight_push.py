"""Weight pushes while the rollout actor generates: `python -m benchmarks.weight_push`.

Two figures of one pool with one actor, pushed to through Ray as the learner does it:

* How long generation stands still. Groups are always under way, and beside them a chain whose ids are counted as they
  come. Around a push, every wait for the next id beyond the median wait counts as standing still, whatever held it up.
  Divided by the time of a step it is the share of wall time; the step is that of a toy run, started here
  (``--step-s`` gives one that was measured before).
* Bytes a second, of a policy of real width, through the object store and by broadcast, against a copy of the same
  bytes in memory, in turn.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from torch import nn

from actors.pool import RolloutPool
from actors.push_group import PushBackend
from actors.rollout_actor import RolloutActor
from actors.spec import RolloutSpec
from actors.weight_sink import ActorWeightSink
from benchmarks import toy_run
from benchmarks.figures import machine, output_option, write
from benchmarks.generation import toy_prompts
from benchmarks.random_family import REAL_SIZE, Width, real_table, write_image_tokenizer, write_policy
from rl_system.config.compose import load_config
from vlcot.groups import Prompt
from vlcot.policy.model import VlcotForCausalLM
from vlcot.sequence import Layout
from vlcot.weights import PushReport, TensorSpec, checksum, pack, plan_buckets

BUCKET_BYTES = 64 * 2**20
STEPS, BEFORE, LAST = 12, 4, 12
GROUPS, WAIT_S = 8, 2.0
BACKENDS: tuple[PushBackend, ...] = ("object_store", "gloo")


def push(sink: ActorWeightSink, version: int, parameters: Mapping[str, nn.Parameter]) -> tuple[float, PushReport]:
    """As :class:`learners.publisher.Publisher` does it, without shards to gather. Seconds, and the report."""
    started = time.perf_counter()
    specs = [TensorSpec(n, tuple(p.shape), str(p.dtype).removeprefix("torch.")) for n, p in parameters.items()]
    layout = plan_buckets(specs, BUCKET_BYTES)
    sink.begin(version, layout)
    sums: dict[str, int] = {}
    for index, bucket in enumerate(layout):
        sink.send(index, pack(bucket, {spec.name: parameters[spec.name].detach() for spec in bucket}))
        sums |= {spec.name: checksum(parameters[spec.name]) for spec in bucket}
    report = sink.finish(sums)
    return time.perf_counter() - started, report


class Probe:
    """In the actor's process: keeps ``GROUPS`` groups under way, and writes down when ids of one more chain come."""

    def __init__(self, actor: RolloutActor, prompts: list[Prompt]) -> None:
        self.times: list[list[float]] = []
        self._actor, self._prompts, self._ends = actor, prompts, False
        self._tasks = [asyncio.create_task(self._keep_busy(i)) for i in range(GROUPS)]
        self._tasks.append(asyncio.create_task(self._watch()))

    async def _keep_busy(self, index: int) -> None:
        while not self._ends:
            await self._actor.generate(self._prompts[index % len(self._prompts)])

    async def _watch(self) -> None:
        from vllm import SamplingParams
        from vllm.inputs.engine import tokens_input
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            max_tokens=160, ignore_eos=True, detokenize=False, output_kind=RequestOutputKind.DELTA, logprobs=0
        )
        while not self._ends:
            number, times = len(self.times), []
            prompt = tokens_input(self._prompts[0].ids.tolist(), cache_salt=f"probe-{number}")
            async for _ in self._actor._engine.generate(prompt, params, request_id=f"probe-{number}"):
                times.append(time.time())
            self.times.append(times)

    async def end(self) -> None:
        """Let what is under way end."""
        self._ends = True
        await asyncio.gather(*self._tasks)


def start_probe(actor: Any, prompts: list[Prompt]) -> None:
    """For :meth:`RolloutActor.apply`."""
    actor.probe = Probe(actor, prompts)


def end_probe(actor: Any) -> None:
    """For :meth:`RolloutActor.apply`."""
    actor.ending = asyncio.create_task(actor.probe.end())


def probe_times(actor: Any) -> list[list[float]] | None:
    """For :meth:`RolloutActor.apply`; None until everything has ended."""
    return actor.probe.times if actor.ending.done() else None


def stood_still(times: list[list[float]], pushes: list[tuple[float, float]]) -> list[float]:
    """Seconds of each push (begin, end) by which waits for an id were longer than the median of all others.

    A push between two chains of the probe is seen by neither; such a one is left out.
    """
    waits = [(a, b) for chain in times for a, b in itertools.pairwise(chain)]
    usual = statistics.median(b - a for a, b in waits if not any(a < end and b > begin for begin, end in pushes))
    seen = [p for p in pushes if any(chain and chain[0] < p[0] and p[1] < chain[-1] for chain in times)]
    return [sum(max(0.0, b - a - usual) for a, b in waits if a < end and b > begin) for begin, end in seen]


def standstill(pushes: int, threads: int) -> dict[str, Any]:
    """With the toy policy."""
    config = load_config(["experiment=toy"])
    spec = RolloutSpec(
        policy=config.policy.path,
        image_tokenizer=config.policy.image_tokenizer,
        group_size=config.rollout.group_size,
        max_new_tokens=config.rollout.max_new_tokens,
        max_num_seqs=config.rollout.max_num_seqs,
        kv_cache_gib=0.5,
        threads=threads,
    )
    parameters = dict(VlcotForCausalLM.from_pretrained(config.policy.path).named_parameters())
    pool = RolloutPool(spec, 1)
    pool.start()
    actor, sink, moments, reports = pool.handles()[0], pool.weight_sink(), [], []
    ray.get(actor.apply.remote(start_probe, toy_prompts(GROUPS)))
    for version in range(1, pushes + 1):
        time.sleep(WAIT_S)
        begin = time.time()
        seconds, report = push(sink, version, parameters)
        moments.append((begin, begin + seconds))
        reports.append(report)
    time.sleep(WAIT_S)
    ray.get(actor.apply.remote(end_probe))
    while (times := ray.get(actor.apply.remote(probe_times))) is None:
        time.sleep(0.2)
    pool.stop()
    still = stood_still(times, moments[1:])  # the first push imports and allocates
    phases = {phase: statistics.median(r.seconds[phase] for r in reports[1:]) for phase in reports[0].seconds}
    return {
        "bytes": reports[0].nbytes,
        "pushes_seen": len(still),
        "stood_still_s": statistics.median(still),
        "push_s": statistics.median(end - begin for begin, end in moments[1:]),
        "phases_s": phases,
    }


def speed(rounds: int, folder: Path) -> dict[str, Any]:
    """Push by each backend and copy in turn, of a policy of 7B's vocabulary and a quarter of its width."""
    width = Width(hidden=1024, layers=4, heads=8, positions=1024)
    write_policy(folder / "policy", real_table(), REAL_SIZE, Layout(64, 8, 16), width, image_start=0.1)
    write_image_tokenizer(folder / "vq", 16_384)
    spec = RolloutSpec(str(folder / "policy"), str(folder / "vq"), group_size=1, max_new_tokens=32, kv_cache_gib=0.5)
    parameters = dict(VlcotForCausalLM.from_pretrained(folder / "policy").named_parameters())
    pool = RolloutPool(spec, 1)
    pool.start()
    nbytes = sum(p.numel() * p.element_size() for p in parameters.values())
    source, copied = np.ones(nbytes, dtype=np.uint8), []
    sinks = {backend: pool.weight_sink(backend) for backend in BACKENDS}
    pushed: dict[str, list[tuple[float, PushReport]]] = {backend: [] for backend in BACKENDS}
    versions = itertools.count(1)
    for _ in range(rounds + 1):
        for backend, sink in sinks.items():
            pushed[backend].append(push(sink, next(versions), parameters))
        started = time.perf_counter()
        target = source.copy()
        copied.append(time.perf_counter() - started)
        del target
    pool.stop()
    copied = copied[1:]  # the first round allocates, and forms the group
    figures: dict[str, Any] = {"bytes": nbytes, "copy_gb_per_s": nbytes / statistics.median(copied) / 1e9}
    for backend, rows in pushed.items():
        took, reports = zip(*rows[1:], strict=True)
        figures[backend] = {
            "push_gb_per_s": nbytes / statistics.median(took) / 1e9,
            "push_over_copy": statistics.median(p / c for p, c in zip(took, copied, strict=True)),
            "phases_s": {p: statistics.median(r.seconds[p] for r in reports) for p in reports[0].seconds},
        }
    return figures


def toy_step_s(folder: Path) -> tuple[float, float]:
    """Mean step of a toy run, and the share of it that its own actor reports as paused."""
    run = toy_run.train(folder, "push", f"learner.steps={STEPS}")
    paused = sum(run.mean(f"time/push_{phase}", BEFORE, LAST) for phase in ("pause", "load", "resume"))
    begin, end = run.window(BEFORE, LAST)
    step = (end - begin) / (LAST - BEFORE)
    return step, paused / step


def main() -> None:
    """Print and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pushes", type=int, default=13)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--step-s", type=float)
    output_option(parser, "weight_push")
    options = parser.parse_args()
    torch.set_num_threads(1)
    figures: dict[str, Any] = {"machine": machine()}
    with tempfile.TemporaryDirectory() as name:
        step_s = options.step_s
        if step_s is None:
            step_s, figures["toy_run_paused_share"] = toy_step_s(Path(name))
        ray.init(address="local", include_dashboard=False, num_cpus=2, object_store_memory=4 * 2**30)
        figures["standstill"] = standstill(options.pushes, options.threads)
        figures["toy_step_s"] = step_s
        figures["stood_still_share"] = figures["standstill"]["stood_still_s"] / step_s
        figures["speed"] = speed(options.rounds, Path(name))
        ray.shutdown()
    write(options.output, figures)


if __name__ == "__main__":
    main()
