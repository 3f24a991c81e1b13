"""The memory plan of `rl-system doctor` against the processes of real runs: three short ones on this machine.

``bases``: the toy with next to no policy and cache; what the plan says of its models is subtracted, and the rest, the
libraries, is written into ``rl_system/doctor/bases.yaml``. ``toy``: the toy as shipped, for a few steps. ``large``: the
toy with a policy of 58 M random values, where a rank is mostly model. ``lora``: the same with adapters. The last three
are compared with the plan.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.figures import machine, output_option, write
from benchmarks.process_memory import Peak, watch
from rl_system.config.compose import compose_config
from rl_system.doctor.bases import FILE, read_bases
from rl_system.doctor.plan import Plan, find_models, make_plan
from vlcot.policy.config import VlcotConfig
from vlcot.policy.model import VlcotForCausalLM

MIB = 2**20
TOY = Path("toy/weights/policy")
FEW = ("evaluation.pictures=1", "learner.warmup_steps=0", "overwrite=true")
SMALL = ("evaluation.prompts=2", "learner.groups_per_step=2", "rollout.group_size=2", "rollout.max_num_seqs=4")
RUNS = {
    "bases": (
        *(*FEW, *SMALL, "learner.steps=2", "learner.micro_batch_tokens=512"),
        *("rollout.kv_cache_gib=0.0625", "reward.qwen_vl.kv_cache_gib=0.0625"),
    ),
    "toy": (*FEW, "learner.steps=4"),
    "large": (*FEW, *SMALL, "learner.steps=2"),
    "lora": (*FEW, *SMALL, "learner.steps=2", "learner.lora.rank=8"),
}
POLICIES = {
    "bases": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "heads": 1},
    "large": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 8, "heads": 12},
}
POLICIES["lora"] = POLICIES["large"]
TESTED = 0.1
"""Share of a process's peak that is its model's; below, the comparison says nothing of the model's part."""


def random_policy(directory: Path, heads: int, **sizes: int) -> None:
    """The toy policy's tokenizer and layout with other sizes and random weights."""
    directory.mkdir()
    shutil.copy(TOY / "tokenizer.json", directory)
    config = json.loads((TOY / "config.json").read_text()) | sizes
    config |= {"num_attention_heads": heads, "num_key_value_heads": heads, "head_dim": sizes["hidden_size"] // heads}
    torch.manual_seed(0)
    VlcotForCausalLM(VlcotConfig(**config)).save_pretrained(directory)


def measure(name: str, folder: Path) -> tuple[Plan, list[Peak]]:
    """One run: its plan, and its processes' peaks.

    Raises:
        RuntimeError: it failed.
    """
    overrides = ["experiment=toy", f"output_dir={folder}", f"name={name}", *RUNS[name]]
    if name in POLICIES:
        random_policy(folder / "policy", **POLICIES[name])
        overrides.append(f"policy.path={folder / 'policy'}")
    config = compose_config(overrides)
    with tempfile.TemporaryFile("w+") as output:
        command = [sys.executable, "-m", "rl_system", "train", *overrides]
        environment = os.environ | {"RAY_AUTH_MODE": "disabled"}
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
        peaks = watch(process)
        if process.returncode:
            output.seek(0)
            raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}: {output.read()[-2000:]}")
    return make_plan(config, find_models(config)), peaks


def bases(plan: Plan, peaks: Sequence[Peak]) -> dict[str, list[int]]:
    """Kind -> MiB resident and private, without what the plan says of its models."""
    found = {}
    for process in plan.processes:
        resident, private = largest(peaks, process.kind)
        own = process.host_part + sum(process.once.values())
        found[process.kind] = [round((resident - process.resident) / MIB), round((private - own) / MIB)]
    return found


def largest(peaks: Sequence[Peak], kind: str) -> tuple[int, int]:
    """Bytes resident and private of the largest process of a kind."""
    of_kind = [peak for peak in peaks if peak.kind == kind]
    return max(peak.resident for peak in of_kind), max(peak.private for peak in of_kind)


def compared(plan: Plan, peaks: Sequence[Peak]) -> dict[str, dict[str, Any]]:
    """Kind -> MiB planned and measured, and how far the plan is off, for the whole and for the models' part."""
    rows = {}
    for process in plan.processes:
        base = read_bases()[process.kind].resident
        planned, (seen, _) = plan.resident(process), largest(peaks, process.kind)
        own = planned - base
        rows[process.kind] = {
            "planned_mib": round(planned / MIB),
            "measured_mib": round(seen / MIB),
            "error": round(planned / seen - 1, 3),
            "model_planned_mib": round(own / MIB),
            "model_measured_mib": round((seen - base) / MIB),
            "model_tested": own > TESTED * seen,
        }
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", choices=RUNS, nargs="+", default=list(RUNS))
    output_option(parser, "memory_plan")
    args = parser.parse_args()
    figures = json.loads(args.output.read_text()) if args.output.exists() else {}
    figures["machine"] = machine()
    for name in args.only:
        with tempfile.TemporaryDirectory(prefix="memory-plan-") as folder:
            plan, peaks = measure(name, Path(folder))
        if name == "bases":
            write_bases(bases(plan, peaks))
        else:
            figures[name] = compared(plan, peaks)
        write(args.output, figures)


def write_bases(mib: dict[str, list[int]]) -> None:
    """Into the file that the plan reads."""
    lines = [f"  {kind}: {sizes}" for kind, sizes in mib.items()]
    head = (
        f"# MiB of a process without its model: resident, private. Written by benchmarks/memory_plan.py; {machine()}.\n"
    )
    FILE.write_text(head + "mib:\n" + "\n".join(lines) + "\n", encoding="utf-8")
    read_bases.cache_clear()


if __name__ == "__main__":
    main()
