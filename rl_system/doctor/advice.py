"""What of a plan does not fit a machine, and which settings would make it fit."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from functools import partial

from rl_system.config.schema import TrainConfig
from rl_system.doctor.machine import Machine
from rl_system.doctor.plan import Models, Plan, make_plan

HOST = "host memory"

Change = dict[str, object]
"""Setting -> value."""

MOST_UTILISATION = 0.95
"""Of a GPU that vLLM may be given; CUDA needs the rest."""
STEP = 256
"""Of a token budget that is searched."""


def misfits(plan: Plan, machine: Machine) -> list[str]:
    """Kinds of processes that a GPU cannot hold, and ``host memory`` if that is too small."""
    found = [p.kind for p in plan.processes if p.gpus and machine.gpu_memory and not p.fits(machine.gpu_memory)]
    if machine.memory is not None and plan.host_total > machine.memory:
        found.append(HOST)
    return found


def changed(config: TrainConfig, change: Change) -> TrainConfig:
    """The same with other settings."""
    config = copy.deepcopy(config)
    for key, value in change.items():
        *path, name = key.split(".")
        owner = config
        for part in path:
            owner = getattr(owner, part)
        setattr(owner, name, value)
    return config


def remedies(config: TrainConfig, sizes: Models, machine: Machine, kind: str) -> list[str]:
    """Overrides, each of which alone makes ``kind`` fit; if none does, the first few together; else nothing.

    A change that asks for more GPUs than there are is left out.
    """
    most = max(machine.gpus, make_plan(config, sizes).gpus)

    def good(change: Change) -> bool:
        plan = make_plan(changed(config, change), sizes)
        return kind not in misfits(plan, machine) and plan.gpus <= most

    ways = CHANGES.get(kind)
    if ways is None:
        return []
    alone: list[Change] = []
    together: Change = {}
    for way in filter(None, ways(config, sizes)):
        found = next((change for change in way if good(change)), None)
        if found is not None:
            alone.append(found)
        elif not alone:
            together |= way[-1]
            if good(together):
                alone.append(dict(together))
    return [" ".join(f"{key}={_said(value)}" for key, value in change.items()) for change in alone]


def _said(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


Ways = Callable[[TrainConfig, Models], Iterator[list[Change]]]
"""Kinds of change, mildest first; of each, values from the mildest on."""


def _learner(config: TrainConfig, sizes: Models) -> Iterator[list[Change]]:
    learner = config.learner
    if not learner.activation_checkpointing:
        yield [{"learner.activation_checkpointing": True}]
    if learner.use_gpu and not learner.offload_reference and config.grpo.kl_beta > 0 and not learner.lora.rank:
        yield [{"learner.offload_reference": True}]
    if budgets := _budgets(config, sizes):
        yield budgets
    yield [{"learner.ranks": ranks} for ranks in range(learner.ranks + 1, 8 * learner.ranks + 1)]


def _budgets(config: TrainConfig, sizes: Models) -> list[Change]:
    """Smaller token budgets, down to one chain under its prompt: less changes nothing."""
    least = sizes.prompt_ids + config.rollout.max_new_tokens
    high = math.ceil(config.learner.micro_batch_tokens / STEP) - 1
    return [{"learner.micro_batch_tokens": STEP * n} for n in range(high, math.ceil(least / STEP) - 1, -1)]


def _engine(config: TrainConfig, sizes: Models, key: str) -> Iterator[list[Change]]:
    server = config.rollout if key == "rollout" else config.reward.qwen_vl
    share = server.gpu_memory_utilization
    steps = range(round(100 * share) + 1, round(100 * MOST_UTILISATION) + 1)
    if steps and server.num_gpus >= 1:
        yield [{f"{key}.gpu_memory_utilization": percent / 100} for percent in steps]
    if key == "rollout":
        longest, images = config.rollout.max_new_tokens, sum(sizes.policy.image_ids)
        yield [{"rollout.group_size": size} for size in range(config.rollout.group_size - 1, 1, -1)]
        yield [{"rollout.max_new_tokens": n} for n in range(longest - STEP, images + STEP, -STEP)]
    else:
        longest = config.reward.qwen_vl.max_model_len
        yield [{f"{key}.max_model_len": n} for n in range(longest - STEP, longest // 2, -STEP)]
    wider = [2 * server.tensor_parallel_size, 4 * server.tensor_parallel_size]
    yield [{f"{key}.tensor_parallel_size": n, f"{key}.num_gpus": n} for n in wider]


def _detector(config: TrainConfig, _: Models) -> Iterator[list[Change]]:
    if config.reward.grounded_sam.num_gpus < 1:
        yield [{"reward.grounded_sam.num_gpus": 1}]
    yield [{"reward.objects": "qwen_vl"}]  # no Grounded-SAM at all: the paper's ablation


def _host(config: TrainConfig, sizes: Models) -> Iterator[list[Change]]:
    if config.learner.offload_reference:
        yield [{"learner.offload_reference": False}]
    if not config.learner.use_gpu:
        if not config.learner.activation_checkpointing:
            yield [{"learner.activation_checkpointing": True}]
        if budgets := _budgets(config, sizes):
            yield budgets[-1:]
    for key, server in (("rollout", config.rollout), ("reward.qwen_vl", config.reward.qwen_vl)):
        if not server.num_gpus:
            yield [{f"{key}.kv_cache_gib": server.kv_cache_gib * part / 4} for part in (3, 2, 1)]
    yield [{"rollout.actors": n} for n in range(config.rollout.actors - 1, 0, -1)]
    yield [{"learner.ranks": n} for n in range(config.learner.ranks - 1, 0, -1)]


CHANGES: dict[str, Ways] = {
    "learner rank": _learner,
    "rollout engine": partial(_engine, key="rollout"),
    "expert engine": partial(_engine, key="reward.qwen_vl"),
    "Grounded-SAM replica": _detector,
    HOST: _host,
}
