"""From the configuration to the settings of each part."""

from __future__ import annotations

import os

import ray

from actors.spec import RolloutSpec
from learners.spec import LearnerSpec
from reward_servers.client import GROUNDED_SAM, QWEN_VL
from reward_servers.deploy import RewardAppSpec
from reward_servers.detection import MainRule
from reward_servers.grounded_sam import GroundedSamConfig
from reward_servers.qwen_vl import VisualExpertConfig
from rl_system.config.schema import TrainConfig
from rl_system.coordination.coordinator import Plan
from rl_system.coordination.scoring import MinViableGroup
from rl_system.data.rows import ImageFolder, RowSource, ToyPhotographs
from vlcot.grpo import AdvantageConfig, LossConfig
from vlcot.policy.family import Family


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
    )


def detector_config(config: TrainConfig) -> GroundedSamConfig:
    """Settings of the Grounded-SAM server."""
    sam = config.reward.grounded_sam
    return GroundedSamConfig(
        detector=sam.detector,
        segmenter=sam.segmenter,
        vocabulary=tuple(sam.vocabulary),
        box_threshold=sam.box_threshold,
        text_threshold=sam.text_threshold,
        nms_iou=sam.nms_iou,
        main=MainRule(sam.min_mask_area, sam.min_score, sam.max_objects),
        device="cuda" if sam.num_gpus else "cpu",
        threads=sam.threads,
    )


def detector_app(config: TrainConfig) -> RewardAppSpec:
    """How the Grounded-SAM server runs."""
    sam = config.reward.grounded_sam
    return RewardAppSpec(
        GROUNDED_SAM,
        num_replicas=sam.replicas,
        ray_actor_options={
            "num_cpus": sam.num_cpus,
            "num_gpus": sam.num_gpus,
            "runtime_env": {"env_vars": {"OMP_NUM_THREADS": str(sam.threads)}},
        },
    )


def expert_config(config: TrainConfig) -> VisualExpertConfig:
    """Settings of the visual expert."""
    expert = config.reward.qwen_vl
    return VisualExpertConfig(
        model=expert.model,
        max_images=config.rollout.group_size,
        max_model_len=expert.max_model_len,
        kv_cache_gib=None if expert.num_gpus else expert.kv_cache_gib,
        dtype=expert.dtype,
        seed=config.seed,
        threads=expert.threads,
        tensor_parallel_size=expert.tensor_parallel_size,
        gpu_memory_utilization=expert.gpu_memory_utilization,
        enforce_eager=expert.num_gpus == 0,
    )


def expert_app(config: TrainConfig) -> RewardAppSpec:
    """How the visual expert runs."""
    expert = config.reward.qwen_vl
    return RewardAppSpec(
        QWEN_VL,
        num_replicas=expert.replicas,
        ray_actor_options={
            "num_cpus": expert.num_cpus,
            "num_gpus": expert.num_gpus,
            "runtime_env": {"env_vars": {"OMP_NUM_THREADS": str(expert.threads)}},
        },
    )


def row_source(config: TrainConfig) -> RowSource:
    """Where rows come from.

    Raises:
        ValueError: the folder or one of its images cannot be used.
    """
    if config.data.source == "folder":
        size = Family.from_pretrained(config.policy.path).layout.full_size
        return ImageFolder(config.data.path, size, config.seed)
    return ToyPhotographs(config.seed)


def plan(config: TrainConfig) -> Plan:
    """How much is trained, and how asynchronously."""
    return Plan(
        steps=config.learner.steps,
        groups_per_step=config.learner.groups_per_step,
        max_staleness=config.coordination.max_staleness,
        stall_timeout_s=config.coordination.stall_timeout_s,
        policy=MinViableGroup(config.reward.min_viable_share),
    )


def resources_needed(config: TrainConfig) -> dict[str, float]:
    """CPUs and GPUs that the whole run takes from Ray."""
    sam, expert = config.reward.grounded_sam, config.reward.qwen_vl
    cpus = (
        config.rollout.actors * config.rollout.num_cpus
        + config.learner.ranks * config.learner.num_cpus
        + sam.replicas * sam.num_cpus
        + expert.replicas * expert.num_cpus
    )
    gpus = (
        config.rollout.actors * config.rollout.num_gpus
        + config.learner.ranks * float(config.learner.use_gpu)
        + sam.replicas * sam.num_gpus
        + expert.replicas * expert.num_gpus
    )
    return {"CPU": cpus, "GPU": gpus}


def check_resources(config: TrainConfig) -> None:
    """Refuse a request that this machine or cluster can never meet; for a cluster, Ray must be connected.

    Raises:
        ValueError: naming what is needed and what there is.
    """
    if config.cluster.address == "local":
        import torch

        have = {"CPU": float(config.cluster.num_cpus or os.cpu_count() or 1), "GPU": float(torch.cuda.device_count())}
    else:
        have = ray.cluster_resources()
    for name, needed in resources_needed(config).items():
        if needed > have.get(name, 0.0):
            raise ValueError(
                f"the run needs {needed:g} {name} (rollout.actors={config.rollout.actors}, "
                f"learner.ranks={config.learner.ranks}, one or more per reward server), "
                f"but there are {have.get(name, 0.0):g}; ask for less, or raise cluster.num_cpus on a local Ray"
            )
