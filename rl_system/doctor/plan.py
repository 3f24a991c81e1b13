"""The memory plan of an experiment: what each of its processes holds at its peak."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import torch

from rl_system import assembly
from rl_system.config.schema import TrainConfig
from rl_system.config.servers import ServerConfig, own_servers, server_config
from rl_system.doctor import arithmetic, models
from rl_system.doctor.arithmetic import GIB, MIB, Parts
from rl_system.doctor.bases import Base, read_bases

RAY = "Ray"

T = TypeVar("T")


@dataclass(frozen=True)
class Models:
    """Sizes that a plan is made from. ``assumed``: settings of an unreadable checkpoint; the published one counts."""

    policy: models.PolicyShape
    tokenizer: models.TokenizerShape
    vlm: models.VlmShape
    detector: models.DetectorShape
    prompt_ids: int
    assumed: tuple[str, ...] = ()


@dataclass(frozen=True)
class Process:
    """Processes of one kind.

    Attributes:
        kind: as in :mod:`rl_system.doctor.bases`.
        count: how many.
        device: bytes on the GPU of one; empty where it uses none.
        phases: bytes that come on top, there or on a CPU in ``host``, in one phase of a step. A GPU's allocator gives
            the memory of one phase to the next; on a CPU they add up, since glibc keeps what small tensors have
            freed and takes large ones afresh.
        host: bytes of host memory of one, without its base.
        once: bytes of host memory that one of them holds besides.
        gpus: of one.
        share: of those GPUs' memory that it may take.
        cache: bytes of keys and values that it must have room for; more is used where there is more.
        cache_fills: the rest of ``share`` becomes keys and values (vLLM on a GPU).
    """

    kind: str
    count: int
    device: Parts = field(default_factory=dict)
    phases: Mapping[str, Parts] = field(default_factory=dict)
    host: Parts = field(default_factory=dict)
    once: Parts = field(default_factory=dict)
    gpus: float = 0.0
    share: float = 1.0
    cache: float = 0.0
    cache_fills: bool = False

    @property
    def worst_phase(self) -> str | None:
        """Name of the phase that takes most."""
        return max(self.phases, key=lambda name: sum(self.phases[name].values()), default=None)

    @property
    def peak(self) -> dict[str, float]:
        """Bytes by what stands there at the peak; of the device, or of the host where there is none."""
        if not self.gpus:
            return _merged(self.host, *self.phases.values())
        worst = self.worst_phase
        parts = _merged(self.device, self.phases[worst] if worst else {})
        return parts | {"key/value cache": self.cache} if self.cache else parts

    @property
    def device_peak(self) -> float:
        """Bytes on one GPU at least."""
        return sum(self.peak.values()) if self.gpus else 0.0

    @property
    def host_part(self) -> float:
        """Bytes of host memory of one beside its base, without what one of them has besides."""
        return sum((self.host if self.gpus else self.peak).values())

    @property
    def resident(self) -> float:
        """Bytes that the model adds to the resident size of the largest of them."""
        return self.host_part + sum(self.once.values())

    def cache_at(self, memory: float) -> float:
        """Bytes of keys and values on GPUs of so much memory."""
        if not self.cache_fills:
            return self.cache
        return self.share * memory - (self.device_peak - self.cache)

    def fits(self, memory: float) -> bool:
        """Whether a GPU of so many bytes holds it."""
        return self.device_peak <= self.share * memory


@dataclass(frozen=True)
class Plan:
    """What a run takes.

    Attributes:
        processes: by kind.
        shared: bytes in shared memory (Ray's object store, files of a push).
        group_cache: bytes of keys and values of a group of longest chains, on each GPU of an actor.
        checkpoint: bytes of one learner checkpoint.
        policy_file: bytes of an exported policy.
        bases: kind of process -> what it has without its model.
        unplanned: servers whose models are not counted.
    """

    processes: tuple[Process, ...]
    shared: Parts
    group_cache: float
    checkpoint: float
    policy_file: float
    bases: Mapping[str, Base]
    unplanned: tuple[str, ...] = ()

    def base(self, kind: str) -> Base:
        """What a process has without its model; other reward servers are taken for Grounded-SAM's."""
        return self.bases.get(kind, self.bases["Grounded-SAM replica"])

    @property
    def gpus(self) -> float:
        """GPUs of all processes."""
        return sum(process.count * process.gpus for process in self.processes)

    def resident(self, process: Process) -> float:
        """Bytes of the largest process of a kind as the kernel counts them, libraries with it, shared memory not."""
        return self.base(process.kind).resident + process.resident

    def host(self, process: Process) -> float:
        """Bytes of host memory that the largest process of a kind has to itself."""
        return self.base(process.kind).private + process.host_part + sum(process.once.values())

    @property
    def host_total(self) -> float:
        """Bytes of host memory of everything: private memory, and shared memory once."""
        return sum(self.shared.values()) + sum(
            process.count * (self.base(process.kind).private + process.host_part) + sum(process.once.values())
            for process in self.processes
        )


def find_models(config: TrainConfig) -> Models:
    """Sizes of the experiment's models: of its checkpoints, or the published ones where one cannot be read."""
    assumed: list[str] = []

    def found(read: Callable[..., T], published: T, settings: Mapping[str, str]) -> T:
        try:
            return read(*settings.values())
        except (OSError, ValueError):  # what is wrong with it is said by its own check
            assumed.extend(settings)
            return published

    policy, sam, expert = config.policy, config.reward.grounded_sam, config.reward.qwen_vl
    vlm, detector = models.PUBLISHED_VLM, models.PUBLISHED_DETECTOR
    if "qwen_vl" in own_servers(config):
        vlm = found(models.read_vlm, vlm, {"reward.qwen_vl.model": expert.model})
    if "grounded_sam" in own_servers(config):
        both = {"reward.grounded_sam.detector": sam.detector, "reward.grounded_sam.segmenter": sam.segmenter}
        detector = found(models.read_detector, detector, both)
    shape = found(models.read_policy, models.published_policy(), {"policy.path": policy.path})
    image = {"policy.image_tokenizer": policy.image_tokenizer}
    tokenizer = found(models.read_tokenizer, models.PUBLISHED_TOKENIZER, image)
    prompt = models.prompt_ids(shape, policy.instruction, policy.path)
    return Models(shape, tokenizer, vlm, detector, prompt, tuple(assumed))


def make_plan(config: TrainConfig, sizes: Models) -> Plan:
    """The plan of a checked configuration."""
    bucket = min(config.learner.bucket_mib * MIB, _policy_bytes(sizes, config.learner.dtype))
    whole = _policy_bytes(sizes, config.learner.dtype)
    processes = [_driver(config, sizes), _learner(config, sizes, bucket), *_rollout(config, sizes)]
    for name in own_servers(config):
        if name == "grounded_sam":
            processes.append(_detector(config, sizes))
        elif name == "qwen_vl":
            processes += _expert(config, sizes)
        else:
            server = server_config(config, name)
            processes.append(Process(f"{name} replica", _replicas(server), gpus=server.num_gpus))
    processes.append(Process(RAY, 1))
    shared = {
        "object store: weights of two pushes": 2.0 * whole,
        "/dev/shm: a push for each actor": float(config.rollout.actors * whole),
    }
    rollout = config.rollout
    ids = sizes.prompt_ids + rollout.group_size * rollout.max_new_tokens
    return Plan(
        processes=tuple(processes),
        shared=shared,
        group_cache=ids * sizes.policy.key_value_bytes(_itemsize(rollout.dtype)) / rollout.tensor_parallel_size,
        checkpoint=12.0 * _trained(config, sizes),  # float32 weights and two moments; seen in a toy run
        policy_file=float(whole),
        bases=read_bases(),
        unplanned=tuple(name for name in own_servers(config) if name not in ("grounded_sam", "qwen_vl")),
    )


def _itemsize(dtype: str) -> int:
    return getattr(torch, dtype).itemsize


def _policy_bytes(sizes: Models, dtype: str) -> int:
    return sizes.policy.parameters * _itemsize(dtype)


def _trained(config: TrainConfig, sizes: Models) -> int:
    """Values that the optimizer has."""
    lora = assembly.lora_spec(config)
    return sizes.policy.adapters(lora) if lora else sizes.policy.parameters


def _merged(*parts: Parts) -> dict[str, float]:
    return {name: value for part in parts for name, value in part.items()}


def _driver(config: TrainConfig, sizes: Models) -> Process:
    """Tokenises LR images, one at a time, and compares the exported policy at the end."""
    model = arithmetic.image_decoder(sizes.tokenizer, sizes.policy.layout.full_size, 1)
    at_the_end = {"exported policy": float(_policy_bytes(sizes, config.learner.dtype))}
    return Process("driver", 1, host=_merged(model, at_the_end))


def _learner(config: TrainConfig, sizes: Models, bucket: int) -> Process:
    learner, policy = config.learner, sizes.policy
    itemsize, cuda = _itemsize(learner.dtype), learner.use_gpu
    groups = -(-learner.groups_per_step // learner.ranks)
    longest = min(config.rollout.max_new_tokens, policy.max_position_embeddings - sizes.prompt_ids)
    micro = arithmetic.largest_micro(
        sizes.prompt_ids, longest, config.rollout.group_size, groups, learner.micro_batch_tokens
    )
    lora, trained = assembly.lora_spec(config), _trained(config, sizes)
    reference = config.grpo.kl_beta > 0
    states = arithmetic.states(
        policy.parameters,
        learner.ranks,
        itemsize,
        reference=reference and not (cuda and learner.offload_reference),
        adapters=trained if lora else 0,
    )
    always = _merged(states, arithmetic.gathering(policy, itemsize, trained, cuda=cuda))
    checkpointing = learner.activation_checkpointing
    backward = _merged(
        arithmetic.activations(policy, micro, itemsize, checkpointing=checkpointing, cuda=cuda, lora=lora),
        arithmetic.head(policy, micro, itemsize, frozen=lora is not None),
    )
    backward |= arithmetic.reduction(trained, learner.ranks, itemsize)
    update = {"update": arithmetic.update(policy, trained, learner.ranks, cuda=cuda)}
    phases = {"backward": backward, "update": update}
    whole = float(_policy_bytes(sizes, learner.dtype))
    once = {"bucket of a push": 2.0 * arithmetic.pushed(policy, itemsize, bucket)}
    if not cuda:
        return Process("learner rank", learner.ranks, host=always, phases=phases, once=once)
    host = (
        {"reference": itemsize * policy.parameters / learner.ranks} if reference and learner.offload_reference else {}
    )
    device = always | {"CUDA, NCCL, fragments": float(arithmetic.CUDA_LEARNER)}
    once["export of the policy"] = whole
    return Process("learner rank", learner.ranks, device, phases, host, once, gpus=1.0)


def _rollout(config: TrainConfig, sizes: Models) -> list[Process]:
    rollout, policy = config.rollout, sizes.policy
    itemsize, actors, parallel = _itemsize(rollout.dtype), rollout.actors, rollout.tensor_parallel_size
    decoder = arithmetic.image_decoder(sizes.tokenizer, policy.layout.full_size, rollout.group_size)
    actor = Process("rollout actor", actors, host=decoder)
    batched = max(policy.max_position_embeddings, 2048)  # actors.rollout_actor: prompts are prefilled whole
    work = arithmetic.engine_work(policy, itemsize, batched, rollout.max_num_seqs) / parallel
    weights = {"weights": policy.parameters * itemsize / parallel}
    if not rollout.num_gpus:
        parts = weights | {"activations": work, "key/value cache": rollout.kv_cache_gib * GIB}
        return [actor, Process("rollout engine", actors, host=parts)]
    # vLLM refuses to start without room for its longest sequence, and a group must run at once or wait for itself
    group = sizes.prompt_ids + rollout.group_size * rollout.max_new_tokens
    cache = max(group, policy.max_position_embeddings) * policy.key_value_bytes(itemsize) / parallel
    device = weights | {"activations": work, "CUDA, graphs": float(arithmetic.CUDA_ENGINE)}
    engine = Process(
        "rollout engine",
        actors,
        device,
        gpus=rollout.num_gpus,
        share=rollout.gpu_memory_utilization,
        cache=cache,
        cache_fills=True,
    )
    return [actor, engine]


def _detector(config: TrainConfig, sizes: Models) -> Process:
    sam = config.reward.grounded_sam
    count = _replicas(sam)
    parts = arithmetic.detection(sizes.detector, assembly.detector_app(config).batch_size)
    if sam.num_gpus:
        device = _merged(parts, {"CUDA": float(arithmetic.CUDA_ENGINE)})
        return Process("Grounded-SAM replica", count, device, gpus=sam.num_gpus, share=min(1.0, sam.num_gpus))
    return Process("Grounded-SAM replica", count, host=parts)


def _expert(config: TrainConfig, sizes: Models) -> list[Process]:
    expert, vlm = config.reward.qwen_vl, sizes.vlm
    count, itemsize = _replicas(expert), _itemsize(expert.dtype)
    weights = {"weights": vlm.parameters * itemsize / expert.tensor_parallel_size}
    replica = Process("expert replica", count)
    if not expert.num_gpus:
        parts = weights | {"key/value cache": expert.kv_cache_gib * GIB}
        return [replica, Process("expert engine", count, host=parts)]
    device = weights | {
        "activations": float(arithmetic.VISION_WORK),
        "CUDA, graphs": float(arithmetic.CUDA_ENGINE),
    }
    engine = Process(
        "expert engine",
        count,
        device,
        gpus=expert.num_gpus,
        share=expert.gpu_memory_utilization,
        cache=expert.max_model_len * vlm.key_value_bytes(itemsize) / expert.tensor_parallel_size,
        cache_fills=True,
    )
    return [replica, engine]


def _replicas(server: ServerConfig) -> int:
    """So many when the run starts."""
    return server.replicas if server.autoscaling.max_replicas is None else server.autoscaling.min_replicas


def named(plan: Plan, kind: str) -> Process:
    """The processes of one kind. Raises KeyError for one that the plan has not."""
    return {process.kind: process for process in plan.processes}[kind]


def groups_at_once(plan: Plan, memory: float) -> int:
    """Groups of longest chains whose keys and values one rollout actor holds on GPUs of so many bytes."""
    return int(named(plan, "rollout engine").cache_at(memory) // plan.group_cache)
