"""From the configuration to the settings of each part."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from actors.nodes import offered, said
from actors.spec import RolloutSpec
from learners.spec import LearnerSpec, LoraSpec
from reward_servers.breaker import BreakerPolicy
from reward_servers.client import GROUNDED_SAM, IQA, QWEN_VL, RewardClient
from reward_servers.deploy import RewardAppSpec, with_environment
from reward_servers.detection import MainRule
from reward_servers.grounded_sam import GroundedSamConfig
from reward_servers.iqa import IqaConfig
from reward_servers.policies import FailFast, FailurePolicy, MinViableGroup, RetryThenDrop
from reward_servers.qwen_vl import VisualExpertConfig, process_environment
from reward_servers.retry import RetryPolicy
from reward_servers.transports import Transport
from rl_system.config.schema import AutoscalingConfig, TrainConfig
from rl_system.config.servers import ServerConfig, own_servers, server_config, servers
from rl_system.coordination.coordinator import Plan
from rl_system.coordination.experts import CustomReward, Expert, MetricExpert, VisualExpert
from rl_system.coordination.objects import DetectedObjects, GivenObjects, ObjectSource, TaggedObjects
from rl_system.coordination.scoring import Scorer
from rl_system.data.rows import ImageFolder, PreparedRows, RowSource, ToyPhotographs
from vlcot.grpo import AdvantageConfig, LossConfig
from vlcot.policy.family import Family
from vlcot.rewards import METRIC_EXPERTS, ExpertWeights, RewardWeights


@dataclass(frozen=True)
class Demand:
    """Processes of one kind: the setting that says how many, how many, CPUs and GPUs of one, labels of their nodes."""

    setting: str
    count: int
    cpus: float
    gpus: float
    labels: Mapping[str, str]


def rollout_spec(config: TrainConfig) -> RolloutSpec:
    """Settings of the rollout actors."""
    rollout = config.rollout
    return RolloutSpec(
        policy=config.policy.path,
        image_tokenizer=config.policy.image_tokenizer,
        group_size=rollout.group_size,
        temperature=rollout.temperature,
        max_new_tokens=rollout.max_new_tokens,
        max_num_seqs=rollout.max_num_seqs,
        kv_cache_gib=None if rollout.num_gpus else rollout.kv_cache_gib,
        dtype=rollout.dtype,
        on_push=rollout.on_push,
        seed=config.seed,
        threads=rollout.threads,
        tensor_parallel_size=rollout.tensor_parallel_size,
        gpu_memory_utilization=rollout.gpu_memory_utilization,
        enforce_eager=rollout.num_gpus == 0,
    )


def learner_spec(config: TrainConfig) -> LearnerSpec:
    """Settings of the learner group; the reference is the policy that training starts from."""
    learner, grpo = config.learner, config.grpo
    return LearnerSpec(
        policy_path=config.policy.path,
        reference_path=config.policy.path if grpo.kl_beta > 0 else None,
        steps=learner.steps,
        groups_per_step=learner.groups_per_step,
        temperature=config.rollout.temperature,
        max_staleness=config.coordination.max_staleness,
        ranks=learner.ranks,
        learning_rate=learner.learning_rate,
        betas=(learner.beta1, learner.beta2),
        weight_decay=learner.weight_decay,
        warmup_steps=learner.warmup_steps,
        schedule=learner.schedule,  # type: ignore[arg-type]
        max_grad_norm=learner.max_grad_norm,
        epochs_per_batch=learner.epochs_per_batch,
        micro_batch_tokens=learner.micro_batch_tokens,
        activation_checkpointing=learner.activation_checkpointing,
        offload_reference=learner.offload_reference,
        dtype=learner.dtype,  # type: ignore[arg-type]
        seed=config.seed,
        threads=learner.threads,
        bucket_bytes=learner.bucket_mib << 20,
        checkpoint_every=learner.checkpoint_every or learner.steps,
        keep_checkpoints=learner.keep_checkpoints,
        use_gpu=learner.use_gpu,
        advantage=AdvantageConfig(std=grpo.advantage_std, drop_zero_variance=grpo.drop_zero_variance),  # type: ignore[arg-type]
        loss=LossConfig(
            clip_low=grpo.clip_low,
            clip_high=grpo.clip_high,
            kl_beta=grpo.kl_beta,
            kl=grpo.kl,  # type: ignore[arg-type]
            normalisation=grpo.normalisation,  # type: ignore[arg-type]
            max_tokens=config.rollout.max_new_tokens if grpo.normalisation == "dr_grpo" else None,
            is_truncation=grpo.importance_cap,
        ),
        lora=lora_spec(config),
    )


def lora_spec(config: TrainConfig) -> LoraSpec | None:
    """Settings of the adapters; None: none.

    Raises:
        ValueError: an impossible setting, by name.
    """
    lora = config.learner.lora
    return LoraSpec(lora.rank, lora.alpha, tuple(lora.targets), lora.dropout) if lora.rank else None


def detector_config(config: TrainConfig) -> GroundedSamConfig:
    """Settings of the Grounded-SAM server."""
    sam = config.reward.grounded_sam
    return GroundedSamConfig(
        detector=sam.detector,
        segmenter=sam.segmenter,
        vocabulary=sam.vocabulary if isinstance(sam.vocabulary, str) else tuple(sam.vocabulary),
        box_threshold=sam.box_threshold,
        text_threshold=sam.text_threshold,
        nms_iou=sam.nms_iou,
        main=MainRule(sam.min_mask_area, sam.min_score, sam.max_objects),
        device="cuda" if sam.num_gpus else "cpu",
        threads=sam.threads,
    )


def detector_app(config: TrainConfig) -> RewardAppSpec:
    """How the Grounded-SAM server runs."""
    return app_spec(config, GROUNDED_SAM)


def expert_config(config: TrainConfig) -> VisualExpertConfig:
    """Settings of the visual expert."""
    expert = config.reward.qwen_vl
    return VisualExpertConfig(
        model=expert.model,
        max_images=config.rollout.group_size,
        max_model_len=expert.max_model_len,
        kv_cache_gib=None if expert.num_gpus else expert.kv_cache_gib,
        dtype=expert.dtype,
        repeats=expert.repeats,
        retries=expert.retries,
        rationale=expert.rationale,
        seed=config.seed,
        threads=expert.threads,
        tensor_parallel_size=expert.tensor_parallel_size,
        gpu_memory_utilization=expert.gpu_memory_utilization,
        enforce_eager=expert.num_gpus == 0,
    )


def expert_app(config: TrainConfig) -> RewardAppSpec:
    """How the visual expert runs."""
    return app_spec(config, QWEN_VL)


def iqa_config(config: TrainConfig) -> IqaConfig:
    """Settings of the metrics server: the expert's metrics, or those of them that were chosen."""
    iqa = config.reward.iqa
    return IqaConfig(
        metrics=tuple(iqa.metrics) or METRIC_EXPERTS[config.reward.expert],
        weights_dir=iqa.weights_dir,
        device="cuda" if iqa.num_gpus else "cpu",
        threads=iqa.threads,
    )


def iqa_app(config: TrainConfig) -> RewardAppSpec:
    """How the metrics server runs."""
    return app_spec(config, IQA)


def reward_apps(config: TrainConfig) -> dict[str, RewardAppSpec]:
    """How each reward server that a run asks is to run, by name."""
    return {name: app_spec(config, name) for name in servers(config)}


def app_spec(config: TrainConfig, name: str) -> RewardAppSpec:
    """How one reward server runs."""
    server = server_config(config, name)
    spec = RewardAppSpec(
        name,
        num_replicas=server.replicas,
        autoscaling=_autoscaling(server.autoscaling),
        ray_actor_options=_replica_options(server),
    )
    return with_environment(spec, process_environment(expert_config(config))) if name == QWEN_VL else spec


def scorer(config: TrainConfig, client: RewardClient) -> Scorer:
    """The rewards of the run, asked for through ``client``."""
    reward = config.reward
    expert: Expert
    if reward.expert in METRIC_EXPERTS:
        expert = MetricExpert(client, iqa_config(config).metrics, with_truth=reward.expert == "perceptual")
    else:
        expert = VisualExpert(client, ExpertWeights(**vars(reward.expert_weights)))
    extra = {name: extra.weight for name, extra in reward.extra.items() if extra.weight > 0}
    weights = RewardWeights(**vars(reward.weights), extra=extra)
    custom = {name: CustomReward(client, name) for name in extra}
    return Scorer(weights, object_source(config, client), expert, custom, client.left_alone)


def object_source(config: TrainConfig, client: RewardClient) -> ObjectSource:
    """Who names the main objects."""
    sources: dict[str, ObjectSource] = {
        "grounded_sam": DetectedObjects(client),
        "tagged_grounded_sam": DetectedObjects(client, tagged=True),
        "qwen_vl": TaggedObjects(client, config.reward.grounded_sam.max_objects),
        "file": GivenObjects(),
    }
    return sources[config.reward.objects]


def reward_client(config: TrainConfig, transport: Transport) -> RewardClient:
    """Asks the servers behind ``transport`` as the configuration says."""
    asked = config.reward.client
    return RewardClient(
        transport,
        config.reward.timeout_s,
        RetryPolicy(asked.attempts, asked.attempt_timeout_s, asked.hedge_after_s),
        BreakerPolicy(asked.breaker_failures, asked.breaker_pause_s),
        seed=config.seed,
    )


def failure_policy(config: TrainConfig) -> FailurePolicy:
    """What becomes of a group in which a reward failed."""
    reward = config.reward
    policies: dict[str, FailurePolicy] = {
        "min_viable_group": MinViableGroup(reward.min_viable_share),
        "retry_then_drop": RetryThenDrop(reward.rescore),
        "fail_fast": FailFast(),
    }
    return policies[reward.failure_policy]


def _autoscaling(scaling: AutoscalingConfig) -> dict[str, Any] | None:
    """As Serve takes it; None: a fixed number of replicas."""
    return None if scaling.max_replicas is None else asdict(scaling)


def _replica_options(server: ServerConfig) -> dict[str, Any]:
    return {
        "num_cpus": server.num_cpus,
        "num_gpus": server.num_gpus,
        "label_selector": server.labels,
        "runtime_env": {"env_vars": {"OMP_NUM_THREADS": str(server.threads)}},
    }


def row_source(config: TrainConfig) -> RowSource:
    """Where rows come from.

    Raises:
        ValueError: the folder or one of its images cannot be used.
    """
    if config.data.source == "folder":
        size = Family.from_pretrained(config.policy.path).layout.full_size
        return ImageFolder(config.data.path, size, config.seed, config.data.tags)
    if config.data.source == "prepared":
        size = Family.from_pretrained(config.policy.path).layout.full_size
        return PreparedRows(config.data.path, size, with_objects=config.reward.objects == "file")
    return ToyPhotographs(config.seed)


def plan(config: TrainConfig) -> Plan:
    """How much is trained, and how asynchronously."""
    return Plan(
        steps=config.learner.steps,
        groups_per_step=config.learner.groups_per_step,
        max_staleness=config.coordination.max_staleness,
        stall_timeout_s=config.coordination.stall_timeout_s,
        policy=failure_policy(config),
    )


def demands(config: TrainConfig) -> list[Demand]:
    """Everything that the run takes from Ray when it starts."""
    rollout, learner = config.rollout, config.learner
    return [
        Demand("rollout.actors", rollout.actors, rollout.num_cpus, rollout.num_gpus, rollout.labels),
        Demand("learner.ranks", learner.ranks, learner.num_cpus, float(learner.use_gpu), learner.labels),
        *(_server_demand(config, name) for name in own_servers(config)),
    ]


def _server_demand(config: TrainConfig, name: str) -> Demand:
    server = server_config(config, name)
    key = f"reward.extra.{name}" if name in config.reward.extra else f"reward.{name}"
    scaling = server.autoscaling
    setting, count = (
        ("replicas", server.replicas)
        if scaling.max_replicas is None
        else ("autoscaling.min_replicas", scaling.min_replicas)
    )
    return Demand(f"{key}.{setting}", count, server.num_cpus, server.num_gpus, server.labels)


def resources_needed(wanted: list[Demand]) -> dict[str, float]:
    """CPUs and GPUs of all of them together."""
    return {"CPU": sum(d.count * d.cpus for d in wanted), "GPU": sum(d.count * d.gpus for d in wanted)}


def check_resources(config: TrainConfig) -> None:
    """Refuse a request that this machine or cluster can never meet; for a cluster, Ray must be connected.

    Raises:
        ValueError: naming what is needed, on nodes with which labels, and what there is.
    """
    wanted = demands(config)
    for labels in [d.labels for d in wanted if d.labels] + [{}]:
        inside = [d for d in wanted if labels.items() <= d.labels.items()]
        settings = ", ".join(f"{d.setting}={d.count}" for d in inside)
        on = f" on nodes with {said(labels)}" if labels else ""
        try:
            have = _local_resources(config) if config.cluster.address == "local" else offered(labels)
        except ValueError as error:
            raise ValueError(f"the run cannot place {settings}: {error}") from None
        for name, needed in resources_needed(inside).items():
            if needed > have.get(name, 0.0):
                raise ValueError(
                    f"the run needs {needed:g} {name}{on} ({settings}), but there are {have.get(name, 0.0):g}; "
                    "ask for less, or raise cluster.num_cpus on a local Ray"
                )


def _local_resources(config: TrainConfig) -> dict[str, float]:
    import torch

    return {"CPU": float(config.cluster.num_cpus or os.cpu_count() or 1), "GPU": float(torch.cuda.device_count())}
