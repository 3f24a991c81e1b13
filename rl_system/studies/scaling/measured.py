"""What a finished or running training run says about its costs."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from statistics import mean, pstdev
from typing import Any

import yaml

from rl_system.runs.directory import RunDirectory
from rl_system.runs.groups import read_groups
from rl_system.runs.sinks import StepMetrics, read_metrics
from rl_system.runs.timeline import TimelineEvent, read_timeline

FEWEST_STEPS = 5
"""A mean over fewer step times says little."""


@dataclass(frozen=True)
class Setting:
    """What of a run's configuration the pipeline depends on; the names are those of the configuration."""

    groups_per_step: int
    max_staleness: int
    group_size: int
    max_num_seqs: int
    actors: int
    detectors: int
    experts: int
    ranks: int
    rank_threads: int


@dataclass(frozen=True)
class MeasuredRun:
    """Means over what ended after the first step, in seconds.

    Attributes:
        steps: that were made.
        learner_start_s: from the first group's start until the learner began its first step.
        step_s: from one push to the next.
        generation_s: of a group, from its arrival at the actor.
        reward_s: of a group, from its last token.
        train_s: of the learner, without waiting and without the push.
        push_s: of a push, ``load_s`` included, during which generation stands still.
        tokens: of a chain.
        tokens_std: standard deviation over the kept chains.
    """

    name: str
    setting: Setting
    steps: int
    learner_start_s: float
    step_s: float
    generation_s: float
    reward_s: float
    train_s: float
    push_s: float
    load_s: float
    tokens: float
    tokens_std: float


def read_run(run: RunDirectory) -> MeasuredRun:
    """Measure ``run``.

    Raises:
        ValueError: it has fewer than :data:`FEWEST_STEPS` steps, its steps are not those of one
            attempt, or it used GPUs.
    """
    config = yaml.safe_load(run.config.read_text())
    if config["learner"]["use_gpu"] or config["rollout"]["num_gpus"]:
        raise ValueError(f"{run.path} used GPUs; costs are taken only from runs whose parts share one machine's cores")
    metrics = read_metrics(run.metrics)
    if len(metrics) < FEWEST_STEPS:
        raise ValueError(f"{run.path} has {len(metrics)} finished steps; its costs need at least {FEWEST_STEPS}")
    ends = [m.time_s for m in metrics]
    _check_one_attempt(run, metrics)
    timeline = read_timeline(run.timeline)
    first = metrics[0].values
    began = min(e.start_s for e in timeline if e.process.startswith("rollout "))
    later = metrics[1:]
    pushes = [m.values["time/push_total"] for m in later]
    chains = [s["tokens"] for group in read_groups(run.groups) for s in group.record["samples"]]
    return MeasuredRun(
        name=run.name,
        setting=_setting(config),
        steps=len(metrics),
        learner_start_s=ends[0] - first["time/train"] - first["time/push_total"] - began,
        step_s=(ends[-1] - ends[0]) / len(later),
        generation_s=_mean_duration(timeline, "rollout", ends[0]),
        reward_s=_mean_duration(timeline, "rewards", ends[0]),
        train_s=mean(m.values["time/train"] for m in later),
        push_s=mean(pushes),
        load_s=mean(sum(m.values[f"time/push_{part}"] for part in ("pause", "load", "resume")) for m in later),
        tokens=sum(_trained_tokens(m) for m in later) / sum(m.values["batch/samples"] for m in later),
        tokens_std=pstdev(chains) if chains else 0.0,
    )


def _setting(config: dict[str, Any]) -> Setting:
    rollout, learner, reward = config["rollout"], config["learner"], config["reward"]
    return Setting(
        groups_per_step=learner["groups_per_step"],
        max_staleness=config["coordination"]["max_staleness"],
        group_size=rollout["group_size"],
        max_num_seqs=rollout["max_num_seqs"],
        actors=rollout["actors"],
        detectors=reward["grounded_sam"]["replicas"],
        experts=reward["qwen_vl"]["replicas"],
        ranks=learner["ranks"],
        rank_threads=learner["threads"],
    )


def _check_one_attempt(run: RunDirectory, metrics: list[StepMetrics]) -> None:
    for before, after in pairwise(metrics):
        passed, said = after.time_s - before.time_s, after.values["time/step"]
        if after.step != before.step + 1 or abs(passed - said) > 1.0 + 0.1 * said:
            raise ValueError(
                f"{run.path}: step {after.step} came {passed:.0f} s after step {before.step} but took {said:.0f} s: "
                "the run was interrupted; costs need a run of one attempt"
            )


def _mean_duration(timeline: list[TimelineEvent], process: str, after: float) -> float:
    seconds = [e.end_s - e.start_s for e in timeline if e.process.split()[0] == process and e.end_s > after]
    if not seconds:
        raise ValueError(f"the time line has nothing of '{process}' after the first step")
    return mean(seconds)


def _trained_tokens(metrics: StepMetrics) -> float:
    return metrics.values["throughput/tokens_per_s"] * metrics.values["time/train"]
