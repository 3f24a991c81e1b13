"""The best split of 8, 64 and 1,024 GPUs at 7B, by the model with estimated costs: `python -m benchmarks.scaling_7b`.

Nothing here is measured on a GPU: the figures and where each comes from are in
`rl_system/studies/scaling/costs/7b_h100.yaml`. Seconds for 8 and 64 GPUs, about ten minutes for 1,024. What the file
of results has already is kept: delete it to begin anew.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

from rl_system.studies.scaling.hardware import SHIPPED, Allocation, Cluster, Figures, read_figures
from rl_system.studies.scaling.search import BATCHES, Plan, best_batch, best_plan, bottleneck, evaluate

PAPER = Allocation(4, 2, 1, 1)
A100 = {
    "device__peak_flops": 312e12,
    "device__peak_flops_fp32": 19.5e12,
    "device__bandwidth": 2.04e12,
    "network__inside_node": 300e9,
    "network__between_nodes": 200e9,
}
"""Data sheet of the A100 SXM 80 GB; nodes with eight cards of 200 Gbit/s."""


def record(cluster: Cluster, plan: Plan) -> dict[str, Any]:
    """A plan as JSON."""
    return {
        "gpus": plan.allocation.gpus,
        "split": str(plan.allocation),
        "max_staleness": plan.max_staleness,
        "groups_per_step": plan.groups_per_step,
        "groups_per_s": float(f"{plan.rate:.3g}"),
        "step_s": round(plan.outcome.step_s),
        "busy": {kind: round(share, 2) for kind, share in plan.outcome.busy.items()},
        "ten_percent_faster_gives": {
            k: round(gain, 3) for k, gain in bottleneck(cluster, plan).items() if gain > 0.005
        },
    }


def best(cluster: Cluster, gpus: int, staleness: int) -> Plan:
    """The best split, with the smallest batch that is nearly the fastest."""
    return best_plan(cluster, gpus, best_batch(cluster, gpus, staleness), staleness)


def variants(cluster: Cluster) -> dict[str, Cluster]:
    """Other costs: what the conclusions depend on."""
    return {
        "expert twice as slow": cluster.scaled(expert=2),
        "detector twice as slow": cluster.scaled(detector=2),
        "rollout twice as slow": cluster.scaled(rollout=2),
        "rollout twice as fast": cluster.scaled(rollout=0.5),
        "rollout four times as fast": cluster.scaled(rollout=0.25),
        "learner twice as slow": cluster.scaled(learner=2),
        "learner with shared prefix": cluster.scaled(learner=50_700 / 80_800),
        "groups of 3 (the paper)": cluster.changed(work__group_size=3),
        "100 Gbit/s a node": cluster.changed(network__between_nodes=12.5e9),
        "push ten times as fast": cluster.changed(push__copy=1e11, push__checksum=7e10, push__object_store=2e10),
        "A100": cluster.changed(**A100),
    }


def studies(figures: Figures, gpus: int) -> dict[str, Callable[[], Any]]:
    """What docs/scaling.md says of a cluster of this size, by name."""
    today, moved = Cluster(figures), Cluster(figures, tokenizer_on_gpu=True)

    @cache
    def usual() -> Plan:
        return best(moved, gpus, 1)

    def by_staleness(cluster: Cluster) -> list[dict[str, Any]]:
        batch, start = usual().groups_per_step, usual().allocation
        return [record(cluster, best_plan(cluster, gpus, batch, staleness, start)) for staleness in (0, 1, 2)]

    def given(allocation: Allocation) -> list[dict[str, Any]]:
        return [record(moved, evaluate(moved, allocation, 8, staleness)) for staleness in (0, 1, 2)]

    def batches() -> list[dict[str, Any]]:
        sizes = (8, *(batch for batch in BATCHES if gpus / 4 <= batch <= 4 * gpus and batch != 8))
        return [record(moved, evaluate(moved, usual().allocation, batch, 1)) for batch in sizes]

    def with_other_costs(cluster: Cluster) -> list[dict[str, Any]]:
        batch, start = usual().groups_per_step, usual().allocation
        return [record(cluster, best_plan(cluster, gpus, batch, 1, start))]

    found: dict[str, Callable[[], Any]] = {
        "tokenizer_on_gpu": lambda: by_staleness(moved),
        "tokenizer_on_cpu": lambda: by_staleness(today),
        "batches": batches,
    }
    found |= {title: partial(with_other_costs, cluster) for title, cluster in variants(moved).items()}
    if gpus == PAPER.gpus:
        # detector and expert on halves of one GPU: neither is busy for a tenth of the time
        found |= {"paper": lambda: given(PAPER), "rewards_on_one": lambda: given(Allocation(3, 4, 1, 1))}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--gpus", type=int, nargs="+", default=[8, 64, 1024])
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/scaling_7b.json"))
    args = parser.parse_args()
    name, figures = read_figures(SHIPPED)
    found = json.loads(args.output.read_text()) if args.output.exists() else {"costs": name}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    for gpus in args.gpus:
        of_size = found.setdefault(str(gpus), {})
        for title, study in studies(figures, gpus).items():
            if title not in of_size:
                of_size[title] = study()
                print(f"{gpus} GPUs: {title}", flush=True)
                args.output.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
