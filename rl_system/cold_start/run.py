"""One cold start: trains, exports, samples held-out chains, writes down what they are like."""

from __future__ import annotations

import asyncio
import shutil
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import ray

from actors.pool import RolloutPool
from learners.launch import ColdStartGroup, LearnerResult
from learners.protocols import LearnerStart
from learners.spec import LearnerSpec
from rl_system.cold_start.data import PreparedExamples, held_out_prompts
from rl_system.cold_start.desk import Desk, DeskLine
from rl_system.cold_start.lookout import SAMPLER_STARTS, SAMPLING, TRAINING
from rl_system.cold_start.settings import ColdStartConfig, sampling_spec
from rl_system.coordination.experience_queue import Checkpointing, StepReport
from rl_system.runs.directory import RunDirectory, RunStopped
from rl_system.runs.pictures import write_chain_pictures, write_png
from rl_system.runs.progress import Progress
from rl_system.runs.sinks import PrometheusSink, open_sinks
from vlcot import metrics
from vlcot.groups import Group, Prompt
from vlcot.policy.family import Family
from vlcot.rewards import degradation_reward, format_reward

LOOK_S = 1.0
SHOWN = 8
"""Held-out chains whose pictures are kept."""


def random_start(config: ColdStartConfig, run: RunDirectory) -> str:
    """Policy directory with random weights, made once for a run."""
    import torch

    from vlcot.policy.config import VlcotConfig
    from vlcot.policy.model import VlcotForCausalLM

    directory = run.path / "start"
    if not (directory / "model.safetensors").is_file():
        unfinished = directory.with_name(".start")
        shutil.rmtree(unfinished, ignore_errors=True)
        torch.manual_seed(config.seed)
        model = VlcotForCausalLM(VlcotConfig.from_pretrained(config.policy.path))
        model.to(getattr(torch, config.learner.dtype)).save_pretrained(unfinished)
        shutil.copyfile(Path(config.policy.path) / "tokenizer.json", unfinished / "tokenizer.json")
        unfinished.rename(directory)
    return str(directory)


def train(
    config: ColdStartConfig, spec: LearnerSpec, run: RunDirectory, progress: Progress, secure: Callable[[], None]
) -> LearnerResult:
    """Train to the last step; metrics go to the run's sinks.

    Args:
        secure: returns once what was written to ``run`` so far outlives this machine, as far as it is to.

    Raises:
        RunStopped: SIGTERM came; what was done is in a checkpoint.
        RuntimeError: the learner group failed.
    """
    desk = ray.remote(num_cpus=0)(Desk).remote()
    learner = config.learner
    storage, files = run.learner_storage
    group = ColdStartGroup(
        spec,
        PreparedExamples(config.data, learner.batch_size, config.seed, config.evaluation.prompts),
        DeskLine(desk),
        dropout=learner.dropout,
        z_loss=learner.z_loss,
        evaluate_every=learner.evaluate_every,
        storage_path=storage,
        files=files,
        name=config.name,
        resources={"CPU": learner.num_cpus} | ({"GPU": 1} if learner.use_gpu else {}),
        labels=learner.labels,
    )
    stopping = False

    def stop(*_: object) -> None:
        nonlocal stopping
        stopping = True
        desk.stop.remote()

    before = signal.signal(signal.SIGTERM, stop)
    try:
        progress.stage("starting the learner")
        group.start()
        _follow(group, desk, spec, run, progress, secure)
        result = group.result()
    finally:
        signal.signal(signal.SIGTERM, before)
    if stopping and result.steps < spec.steps:
        raise RunStopped(f"stopped after step {result.steps} of {spec.steps}")
    return result


def _follow(
    group: ColdStartGroup,
    desk: Any,
    spec: LearnerSpec,
    run: RunDirectory,
    progress: Progress,
    secure: Callable[[], None],
) -> None:
    """Log every step until the group has ended and its last report is read."""
    sink, last = None, 0
    try:
        reference = desk.next_report.remote()
        while True:
            ready, _ = ray.wait([reference], timeout=LOOK_S)
            if not ready:
                if not group.running:
                    return
                continue
            event = ray.get(reference)
            reference = desk.next_report.remote()
            if isinstance(event, LearnerStart):
                if sink is not None:
                    sink.close()
                sink, last = open_sinks(run, event.step, PrometheusSink(run.name)), event.step
                progress.stage(TRAINING, last, spec.steps)
            elif isinstance(event, Checkpointing):
                secure()
                ray.get(desk.secured.remote(event.step))
            elif isinstance(event, StepReport) and sink is not None and event.step > last:
                last = event.step
                sink.log(event.step, event.metrics)
                progress.update(event.step, spec.steps, event.metrics, {})
    finally:
        if sink is not None:
            sink.close()


def evaluate(config: ColdStartConfig, policy: Path, run: RunDirectory, progress: Progress) -> dict[str, float | None]:
    """Sample one chain of each held-out question by vLLM.

    Returns:
        ``prompts``; ``format_rate``; ``degradation_accuracy``, components that are right; ``image_rate``, chains with a
        final image; ``psnr``, its mean PSNR in dB (None without any). Pictures of some go to ``evaluation/``.
    """
    progress.stage(SAMPLER_STARTS)
    evaluation = config.evaluation
    size = Family.from_pretrained(policy).layout.full_size
    prompts, targets = zip(*held_out_prompts(config.data, size, evaluation.prompts, config.seed), strict=True)
    resources = {"CPU": evaluation.num_cpus, "GPU": evaluation.num_gpus}
    pool = RolloutPool(sampling_spec(config, str(policy)), 1, resources, evaluation.start_timeout_s)

    sampled = 0

    async def sample_one(prompt: Prompt) -> Group:
        nonlocal sampled
        group = await pool.generate(prompt)
        sampled += 1
        progress.stage(SAMPLING, sampled, len(prompts))
        return group

    async def sample() -> list[Group]:
        return list(await asyncio.gather(*map(sample_one, prompts)))

    try:
        pool.start()
        progress.stage(SAMPLING, 0, len(prompts))
        groups = asyncio.run(sample())
    finally:
        pool.stop()
    _show(run, groups, targets)
    chains = [group.samples[0] for group in groups]
    finals = [(chain.images[-1], target) for chain, target in zip(chains, targets, strict=True)]
    psnr = [metrics.psnr(image, target) for image, target in finals if image is not None]
    right = [degradation_reward(c.chain, p.degradation).value for c, p in zip(chains, prompts, strict=True)]
    return {
        "prompts": len(prompts),
        "format_rate": float(np.mean([format_reward(c.chain).value for c in chains])),
        "degradation_accuracy": float(np.mean(right)),
        "image_rate": len(psnr) / len(prompts),
        "psnr": float(np.mean(psnr)) if psnr else None,
    }


def _show(run: RunDirectory, groups: Sequence[Group], targets: Sequence[np.ndarray]) -> None:
    run.evaluation.mkdir(exist_ok=True)
    lines = []
    for number, (group, target) in enumerate(zip(groups[:SHOWN], targets, strict=False)):
        write_png(run.evaluation / f"{number}-lr.png", group.prompt.lr_image)
        write_png(run.evaluation / f"{number}-target.png", target)
        write_chain_pictures(run.evaluation, str(number), group.samples[0].images)
        lines.append(f"{number}: {group.prompt.degradation}\n   {' | '.join(map(str, group.samples[0].chain.texts))}\n")
    (run.evaluation / "texts.txt").write_text("".join(lines), encoding="utf-8")
