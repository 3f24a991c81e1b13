"""Which split of a cluster's GPUs trains the most groups in a second, and what holds it back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace

from rl_system.studies.scaling.hardware import Allocation, Cluster, CostsRefused
from rl_system.studies.scaling.pipeline import KINDS, Outcome, steady

BATCHES = tuple(2**power for power in range(3, 13))
"""Groups per step that :func:`best_batch` tries."""

ENOUGH = 0.9
"""Share of the best rate at which a batch is large enough: larger ones only make the updates rarer."""

FASTER = 0.9
"""Factor on the time of a kind by which :func:`bottleneck` asks what holds a pipeline back."""

WORTH_IT = 1.003
"""A move of GPUs must gain this factor: below it, it is the noise of a finite simulation."""

SPARE = 1.5
"""Factor on the GPUs of detector and expert where a search begins."""

MOVES = 2
"""Kinds that may get GPUs in a move, and kinds that may give them."""


@dataclass(frozen=True)
class Plan:
    """A split and what it gives."""

    allocation: Allocation
    groups_per_step: int
    max_staleness: int
    outcome: Outcome

    @property
    def rate(self) -> float:
        """Groups trained per second."""
        return self.groups_per_step / self.outcome.step_s


def evaluate(cluster: Cluster, allocation: Allocation, groups_per_step: int, max_staleness: int) -> Plan:
    """Simulate one split.

    Raises:
        CostsRefused: it is none, or the model does not fit.
    """
    outcome = steady(cluster.pipeline(allocation, groups_per_step, max_staleness))
    return Plan(allocation, groups_per_step, max_staleness, outcome)


def best_plan(
    cluster: Cluster, gpus: int, groups_per_step: int, max_staleness: int, start: Allocation | None = None
) -> Plan:
    """Climb from ``start``, or from :func:`balanced`, moving ever fewer GPUs from one kind to another.

    Raises:
        CostsRefused: too few GPUs.
    """
    plan = evaluate(cluster, start or balanced(cluster, gpus), groups_per_step, max_staleness)
    size, least = max(1, gpus // 16), max(1, gpus // 64)
    while size >= least:
        candidates = (evaluate(cluster, moved, groups_per_step, max_staleness) for moved in _moves(cluster, plan, size))
        better = next((c for c in candidates if c.rate > plan.rate * WORTH_IT), None)
        plan, size = (better, size) if better is not None else (plan, size // 2)
    return plan


def best_batch(cluster: Cluster, gpus: int, max_staleness: int) -> int:
    """The smallest of :data:`BATCHES` with :data:`ENOUGH` of the rate of the best one, on :func:`balanced` GPUs."""
    allocation = balanced(cluster, gpus)
    useful = [batch for batch in BATCHES if batch <= max(8, 4 * gpus)]
    rates = {batch: evaluate(cluster, allocation, batch, max_staleness).rate for batch in useful}
    return next(batch for batch in useful if rates[batch] >= ENOUGH * max(rates.values()))


def balanced(cluster: Cluster, gpus: int) -> Allocation:
    """GPUs in proportion to the seconds that one group takes on one GPU of each kind.

    The servers of rewards, which need few, get half as many again: a group waits for them.

    Raises:
        CostsRefused: too few GPUs for the learner's share of the model and one of each other kind.
    """
    rollout, expert, detector = cluster.rollout(), cluster.expert(), cluster.detector()
    full = rollout.base_s / rollout.concurrent + rollout.each_s
    seconds = {
        "learner": cluster.learner_group_s(gpus),
        "rollout": cluster.figures["work"]["chain_tokens"] * full,
        "detector": detector.base_s + detector.each_s,
        "expert": expert.base_s / expert.concurrent + expert.each_s,
    }
    least = {"learner": cluster.least_learner_gpus(), "rollout": 1, "detector": 1, "expert": 1}
    if gpus < sum(least.values()):
        raise CostsRefused(f"{gpus} GPUs are too few: {sum(least.values())} are needed, {least['learner']} to learn")
    total = sum(seconds.values())
    seconds |= {kind: SPARE * seconds[kind] for kind in ("detector", "expert")}
    split = {kind: max(least[kind], round(gpus * s / total)) for kind, s in seconds.items()}
    split["rollout"] = max(1, gpus - sum(count for kind, count in split.items() if kind != "rollout"))
    split["learner"] = gpus - sum(count for kind, count in split.items() if kind != "learner")
    return Allocation(**split)


def bottleneck(cluster: Cluster, plan: Plan) -> dict[str, float]:
    """Share by which the rate grows if a kind, all else equal, takes :data:`FASTER` of its time; largest first."""
    gains = {}
    for kind in KINDS:
        faster = evaluate(cluster.scaled(**{kind: FASTER}), plan.allocation, plan.groups_per_step, plan.max_staleness)
        gains[kind] = faster.rate / plan.rate - 1
    return dict(sorted(gains.items(), key=lambda item: -item[1]))


def _moves(cluster: Cluster, plan: Plan, size: int) -> Iterator[Allocation]:
    """Splits with ``size`` GPUs moved from one kind to another, first to the busiest and from the least busy."""
    names: Sequence[str] = [field.name for field in fields(Allocation)]
    least = {"learner": cluster.least_learner_gpus()}
    by_load = sorted(names, key=lambda kind: -plan.outcome.busy[kind])
    givers = [kind for kind in reversed(by_load) if getattr(plan.allocation, kind) - size >= least.get(kind, 1)]
    for receiver in by_load[:MOVES]:
        for giver in [kind for kind in givers if kind != receiver][:MOVES]:
            less, more = getattr(plan.allocation, giver) - size, getattr(plan.allocation, receiver) + size
            yield replace(plan.allocation, **{giver: less, receiver: more})
