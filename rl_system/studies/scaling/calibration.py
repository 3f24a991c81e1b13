"""Costs of a pipeline on a shared machine, from measured runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
from scipy.optimize import least_squares

from rl_system.studies.scaling.events import EngineCost
from rl_system.studies.scaling.measured import MeasuredRun, Setting
from rl_system.studies.scaling.pipeline import LearnerCost, Outcome, Pipeline, simulate

VLLM_THREADS = 2.0
"""Cores that one vLLM engine uses on a CPU: its worker with one thread, and the loop that feeds it."""

EXPERT_CONCURRENT = 8
"""Requests that the visual expert runs at the same time (``reward_servers.qwen_vl``)."""

PRIOR_WEIGHT = 0.05
"""How much a departure from :data:`TOY` by a factor of e counts, against an error by that factor in one duration."""


@dataclass(frozen=True)
class SharedCosts:
    """Seconds of every part when it has the machine for itself.

    Attributes:
        token_s: of the rollout engine for one token of all its chains, whatever their number.
        token_each_s: more for each chain.
        expert_s: of the expert's engine for a judgement of all its groups, whatever their number.
        expert_each_s: more for each group.
        detector_s: of an image.
        step_s: of the learner, whatever it trains.
        step_group_s: more for each group.
        driver_s: of the driver, twice for each group.
    """

    token_s: float
    token_each_s: float
    expert_s: float
    expert_each_s: float
    detector_s: float
    step_s: float
    step_group_s: float
    driver_s: float


TOY = SharedCosts(
    token_s=0.004,
    token_each_s=0.0002,
    expert_s=0.05,
    expert_each_s=0.03,
    detector_s=0.015,
    step_s=0.4,
    step_group_s=0.15,
    driver_s=0.02,
)
"""Round figures of the toy experiment on two cores, from which a fit starts: one run cannot tell the fixed part of a
cost from the part that grows."""


def pipeline_of(costs: SharedCosts, setting: Setting, run: MeasuredRun, cores: float) -> Pipeline:
    """``setting`` on a machine with so many cores; lengths of chains and times of a push are those of ``run``."""
    return Pipeline(
        groups_per_step=setting.groups_per_step,
        max_staleness=setting.max_staleness,
        group_size=setting.group_size,
        tokens=run.tokens,
        tokens_std=run.tokens_std,
        rollout=EngineCost(costs.token_s, costs.token_each_s, setting.max_num_seqs, VLLM_THREADS),
        detector=EngineCost(costs.detector_s, 0.0, 1),
        expert=EngineCost(costs.expert_s, costs.expert_each_s, EXPERT_CONCURRENT, VLLM_THREADS),
        learner=LearnerCost(
            fixed_s=costs.step_s,
            group_s=costs.step_group_s,
            push_s=run.push_s - run.load_s,
            load_s=run.load_s,
            threads=setting.ranks * setting.rank_threads,
        ),
        replicas=(setting.actors, setting.detectors, setting.experts),
        admit_s=costs.driver_s,
        collect_s=costs.driver_s,
        cores=cores,
    )


def durations(run: MeasuredRun) -> np.ndarray:
    """Seconds of generation, reward, training and the step."""
    return np.array([run.generation_s, run.reward_s, run.train_s, run.step_s])


def simulated(costs: SharedCosts, run: MeasuredRun, cores: float, delay_s: float = 0.0) -> Outcome:
    """``run`` again: its setting, as many steps, and a learner that comes as late; rewards are delayed."""
    pipeline = replace(pipeline_of(costs, run.setting, run, cores), delay_s=delay_s)
    return simulate(pipeline, run.steps, run.learner_start_s)


def fit(runs: Sequence[MeasuredRun], cores: float) -> SharedCosts:
    """Costs with which the simulation of each run has the durations that were measured, as nearly as possible.

    With runs of different ``groups_per_step``, fixed and growing parts of a cost come from the runs; else their ratio
    stays near that of :data:`TOY`.
    """
    start = np.log([getattr(TOY, f.name) for f in fields(SharedCosts)])

    def errors(logs: np.ndarray) -> np.ndarray:
        costs = SharedCosts(*map(math.exp, logs))
        found = [np.log(_durations(simulated(costs, run, cores)) / durations(run)) for run in runs]
        return np.concatenate([*found, PRIOR_WEIGHT * (logs - start)])

    solution = least_squares(errors, start, diff_step=0.02)
    return SharedCosts(*map(math.exp, solution.x))


def _durations(outcome: Outcome) -> np.ndarray:
    return np.array([outcome.generation_s, outcome.reward_s, outcome.train_s, outcome.step_s])
