"""The doctor's findings as one value: table, checks, and what would help."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from rl_system.config.checks import check_settings
from rl_system.config.schema import TrainConfig
from rl_system.doctor.advice import HOST, misfits, remedies
from rl_system.doctor.checks import Check, run_checks
from rl_system.doctor.machine import Machine
from rl_system.doctor.plan import Models, Plan, Process, find_models, groups_at_once, make_plan, named

GIB = 2**30
ANY_NUMBER = 1 << 30
COLUMNS = ("weights", "optimizer", "gradients", "activations", "logits", "key/value cache")
HEADS = (*COLUMNS[:-1], "keys, values")
COLUMN_OF = {
    "reference": "weights",
    "image tokenizer": "weights",
    "decoding": "activations",
    "head gradient": "gradients",
    "gradient bucket": "gradients",
    "reduction": "gradients",
}
"""Part of a plan -> column, where it has not one of its own; all else is ``other``."""


@dataclass(frozen=True)
class Report:
    """What was found.

    Attributes:
        title, head, rows: the memory plan, in GiB.
        notes: on the plan.
        checks: one line each.
        problems: what does not fit, with the settings that would.
    """

    plan: Plan
    machine: Machine
    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...]
    checks: tuple[Check, ...]
    problems: tuple[str, ...]

    @property
    def good(self) -> bool:
        """Nothing that was looked at is bad."""
        return not self.problems and all(check.good is not False for check in self.checks)

    def as_json(self) -> dict[str, Any]:
        """Everything, in bytes."""
        return {
            "good": self.good,
            "machine": asdict(self.machine),
            "processes": [
                {
                    "kind": process.kind,
                    "count": process.count,
                    "gpus": process.gpus,
                    "parts": process.peak,
                    "gpu_bytes": process.device_peak,
                    "host_bytes": self.plan.host(process),
                    "resident_bytes": self.plan.resident(process),
                }
                for process in self.plan.processes
            ],
            "shared_bytes": dict(self.plan.shared),
            "host_bytes": self.plan.host_total,
            "checks": [asdict(check) for check in self.checks],
            "problems": list(self.problems),
        }


def examine(config: TrainConfig, machine: Machine) -> Report:
    """Plan and checks of a composed configuration on a machine.

    Raises:
        ValueError: an impossible setting, as `train` says it.
    """
    check_settings(config)
    sizes = find_models(config)
    plan = make_plan(config, sizes)
    where = f"{machine.gpus} GPUs of {machine.gpu_memory / GIB:.1f} GiB" if machine.gpu_memory else "no GPU"
    return Report(
        plan=plan,
        machine=machine,
        title=f"Memory of {config.name} at its peak, GiB of one process ({where})",
        head=("process", "", *HEADS, "other", "GPU", "host", "fits"),
        rows=(*(_row(plan, process, machine) for process in plan.processes), _host_row(plan, machine)),
        notes=tuple(_notes(config, plan, machine)),
        checks=tuple(run_checks(config, sizes, plan, machine)),
        problems=tuple(_problem(config, sizes, plan, machine, kind) for kind in misfits(plan, machine)),
    )


def _row(plan: Plan, process: Process, machine: Machine) -> tuple[str, ...]:
    columns = dict.fromkeys((*COLUMNS, "other"), 0.0)
    parts = process.peak
    if process.cache_fills and machine.gpu_memory and process.fits(machine.gpu_memory):
        parts["key/value cache"] = process.cache_at(machine.gpu_memory)
    for part, nbytes in parts.items():
        column = part if part in COLUMNS else COLUMN_OF.get(part, "other")
        columns[column] += nbytes
    own = (_gib(value) if value else "" for value in columns.values())
    used = sum(parts.values())
    device = _gib(used) if process.gpus else ""
    verdict = ""
    if process.gpus and machine.gpu_memory:
        device += f" of {_gib(process.share * machine.gpu_memory)}"
        verdict = "yes" if process.fits(machine.gpu_memory) else "NO"
    return (process.kind, str(process.count), *own, device, _gib(plan.host(process)), verdict)


def _host_row(plan: Plan, machine: Machine) -> tuple[str, ...]:
    of = f" of {_gib(machine.memory)}" if machine.memory is not None else ""
    verdict = {True: "yes", False: "NO", None: ""}[
        None if machine.memory is None else plan.host_total <= machine.memory
    ]
    return ("all on one host", "", *[""] * len(COLUMNS), "", "", _gib(plan.host_total) + of, verdict)


def _notes(config: TrainConfig, plan: Plan, machine: Machine) -> list[str]:
    learner = named(plan, "learner rank")
    notes = [f"learner rank: at its peak in {learner.worst_phase}"] if learner.gpus else []
    engine = named(plan, "rollout engine")
    if engine.cache_fills and machine.gpu_memory and engine.fits(machine.gpu_memory):
        groups = groups_at_once(plan, machine.gpu_memory)
        chains = groups * config.rollout.group_size
        line = f"rollout: a GPU has room for {groups} groups of longest chains, {chains} sequences"
        if config.rollout.max_num_seqs > chains:
            line += f"; rollout.max_num_seqs={config.rollout.max_num_seqs} may make vLLM preempt and compute again"
        notes.append(line)
    notes += [f"{name}: its model is not planned, only its process and GPUs" for name in plan.unplanned]
    if config.cluster.address == "auto" and machine.here:
        notes.append("cluster.address=auto: what is looked at is this machine; plan for the cluster with --gpus")
    shared = ", ".join(f"{name} {_gib(nbytes)}" for name, nbytes in plan.shared.items())
    return [*notes, f"shared memory, GiB: {shared}", f"checkpoint of the learner, GiB: {_gib(plan.checkpoint)}"]


def _problem(config: TrainConfig, sizes: Models, plan: Plan, machine: Machine, kind: str) -> str:
    found = remedies(config, sizes, machine, kind)
    if kind == HOST:
        assert machine.memory is not None
        text = f"{HOST}: {_gib(plan.host_total)} GiB needed, {_gib(machine.memory)} there"
        other = f"give it {_gib(plan.host_total - machine.memory)} GiB more"
    else:
        assert machine.gpu_memory is not None
        process = named(plan, kind)
        text = (
            f"{kind}: {_gib(process.device_peak)} GiB of a GPU needed, {_gib(process.share * machine.gpu_memory)} there"
        )
        other = "take GPUs with more memory"
        if not found and (more := remedies(config, sizes, replace(machine, gpus=ANY_NUMBER), kind)):
            other = f"take larger GPUs, or more of them with {', or '.join(more)}"
    return f"{text}. It would fit with {', or '.join(found)}" if found else f"{text}. No setting makes it fit: {other}"


def _gib(nbytes: float) -> str:
    return f"{nbytes / GIB:.2f}" if nbytes < 10 * GIB else f"{nbytes / GIB:.1f}"
