"""Every setting of a training run, typed. The YAML files in ``configs/`` give values, nothing else has any."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING


@dataclass
class PolicyConfig:
    """The model that is trained."""

    path: str = MISSING
    """Cold-started policy: directory with config.json, model.safetensors, tokenizer.json."""
    image_tokenizer: str = MISSING
    """Directory of the VQ image tokenizer."""
    instruction: str = MISSING
    """The question; ``<|image|>`` stands for the LR image."""


@dataclass
class DataConfig:
    """Where prompts come from."""

    source: str = MISSING
    """``toy_photographs``: crops of the photographs inside scikit-image and scikit-learn;
    ``folder``: crops of the images under ``path``; ``prepared``: what ``rl-system prepare-data`` wrote to ``path``."""
    path: str = ""
    tags: str | None = None
    """folder: directory with ``NAME.txt`` for each image ``NAME.png`` under ``path``, the names of its main objects
    separated by commas; needed by ``reward.objects=file``."""
    train_rows: int = MISSING
    """Rows of the training split; they are passed over in order, epoch after epoch, shuffled by the seed."""


@dataclass
class RolloutConfig:
    """vLLM rollout actors."""

    actors: int = 1
    group_size: int = MISSING
    """Samples per LR image (G)."""
    temperature: float = 1.0
    max_new_tokens: int = MISSING
    max_num_seqs: int = 64
    kv_cache_gib: float = 1.0
    """CPU only; on GPUs ``gpu_memory_utilization`` decides."""
    dtype: str = "float32"
    tensor_parallel_size: int = 1
    gpu_memory_utilization: float = 0.9
    num_cpus: float = 1
    num_gpus: float = 0
    threads: int = 1
    push_backend: str = "object_store"
    """How new weights reach the actors: ``object_store`` (Ray's), or broadcast over ``nccl`` (GPUs) or ``gloo``."""
    on_push: str = "continue"
    """What a chain does that is being sampled when new weights come: ``continue`` with them, or ``restart``."""
    labels: dict[str, str] = field(default_factory=dict)
    """Ray labels of the nodes that may hold an actor, as ``{rl.io/pool: rollout}``; empty: any node."""
    start_timeout_s: float = 600


@dataclass
class LoraConfig:
    """Low-rank adapters on frozen weights (docs/grpo.md)."""

    rank: int = 0
    """0: every weight is trained."""
    alpha: float = 16.0
    """The adapters' product counts alpha / rank times."""
    targets: list[str] = field(
        default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )
    """Linear layers that have adapters, in every decoder layer."""
    dropout: float = 0.0
    """Of the adapters' input. The rollout has none, so that with it the ratio of fresh samples is not 1."""


@dataclass
class LearnerConfig:
    """DeepSpeed ZeRO-3 learner."""

    ranks: int = MISSING
    steps: int = MISSING
    groups_per_step: int = MISSING
    epochs_per_batch: int = 1
    learning_rate: float = MISSING
    beta1: float = 0.9
    beta2: float = 0.95
    weight_decay: float = 0.0
    warmup_steps: int = 0
    schedule: str = "constant"
    """constant | cosine"""
    max_grad_norm: float = 1.0
    micro_batch_tokens: int = MISSING
    """Most tokens, padding included, of one forward pass; the samples of a group share their prompt in it."""
    activation_checkpointing: bool = False
    """Backward computes activations again instead of keeping them: less memory, a third more arithmetic."""
    offload_reference: bool = False
    """Keep the frozen reference's shards in host memory instead of on the GPU."""
    dtype: str = "float32"
    bucket_mib: int = 64
    checkpoint_every: int = 10
    """Steps between checkpoints; 0: at the end only."""
    keep_checkpoints: int = 2
    lora: LoraConfig = field(default_factory=LoraConfig)
    num_cpus: float = 1
    use_gpu: bool = False
    threads: int = 1
    labels: dict[str, str] = field(default_factory=dict)
    """Ray labels of the nodes that may hold a rank, as ``{rl.io/pool: learner}``; empty: any node."""


@dataclass
class GrpoConfig:
    """The objective (docs/grpo.md)."""

    clip_low: float = 0.2
    clip_high: float = 0.2
    kl_beta: float = 0.04
    kl: str = "k3"
    normalisation: str = "sequence"
    """sequence (eq. 1) | token | dr_grpo"""
    advantage_std: str = "unbiased"
    """unbiased | population | none"""
    drop_zero_variance: bool = False
    importance_cap: float | None = None
    """Token-level truncated importance sampling; null: off."""


@dataclass
class RewardWeightsConfig:
    """Weights of the four rewards in the total; 0 switches one off, and the server that it alone needs."""

    format: float = 1.0
    degradation: float = 1.0
    understanding: float = 1.0
    generation: float = 1.0


@dataclass
class ExpertWeightsConfig:
    """Weights of the expert's scores inside the generation reward; they sum to 1."""

    quality: float = 0.4
    realism: float = 0.3
    consistency: float = 0.3


@dataclass
class AutoscalingConfig:
    """How the number of a reward server's replicas follows the load (Ray Serve's settings of the same names)."""

    max_replicas: int | None = None
    """null: no autoscaling, there are always ``replicas``; a number: ``replicas`` has no meaning."""
    min_replicas: int = 1
    """A run starts with so many."""
    target_ongoing_requests: float = 4.0
    """Requests for each replica, waiting ones included, that the number of replicas aims at."""
    upscale_delay_s: float = 30.0
    downscale_delay_s: float = 600.0
    metrics_interval_s: float = 10.0
    """Seconds between two measurements of the load."""
    look_back_period_s: float = 30.0
    """Seconds over which the load is averaged."""


@dataclass
class ReplicasConfig:
    """What every reward server has: how many replicas, on what."""

    replicas: int = 1
    autoscaling: AutoscalingConfig = field(default_factory=AutoscalingConfig)
    num_cpus: float = 1
    num_gpus: float = 0
    threads: int = 1
    labels: dict[str, str] = field(default_factory=dict)
    """Ray labels of the nodes that may hold a replica, as ``{rl.io/pool: reward-sam}``; empty: any node."""


@dataclass
class GroundedSamServerConfig(ReplicasConfig):
    """The Grounded-SAM application."""

    detector: str = MISSING
    segmenter: str = MISSING
    vocabulary: Any = MISSING
    """Names to look for, ``common`` for the shipped list of 523, or a file with one name a line."""
    box_threshold: float = 0.25
    text_threshold: float = 0.2
    nms_iou: float = 0.5
    min_mask_area: float = 0.04
    """Share of the image that a main object covers at least."""
    min_score: float = 0.3
    """Confidence of a main object at least."""
    max_objects: int = 3
    """Most main objects of an image."""


@dataclass
class VisualExpertServerConfig(ReplicasConfig):
    """The Qwen2.5-VL application."""

    model: str = MISSING
    max_model_len: int = MISSING
    kv_cache_gib: float = 1.0
    dtype: str = "float32"
    repeats: int = 1
    """Times that each group is judged, in other orders; the scores are averaged."""
    retries: int = 2
    """Further attempts when an answer cannot be read."""
    rationale: bool = False
    """Whether each score comes with its reason; costs tokens."""
    tensor_parallel_size: int = 1
    gpu_memory_utilization: float = 0.9


@dataclass
class IqaServerConfig(ReplicasConfig):
    """The image-quality metrics application, for the experts ``perceptual`` and ``generative``."""

    metrics: list[str] = field(default_factory=list)
    """Some of the expert's metrics; empty: all of them."""
    weights_dir: str | None = None
    """Folder with the metrics' weight files (docs/evaluate.md); torch's hub folder is searched too. Nothing is
    downloaded: a metric without its weights is refused."""


@dataclass
class ExtraRewardConfig(ReplicasConfig):
    """A reward of your own, served beside the others (docs/reward-servers.md)."""

    target: str = MISSING
    """``module:Class``; the class has ``score(lr, images)``, which answers a number in [0, 1] for each image."""
    weight: float = 1.0
    """In the total; 0 switches it off."""
    options: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the class."""


@dataclass
class RewardClientConfig:
    """How servers are asked (docs/reward-servers.md)."""

    attempts: int = 4
    """Times that a request is sent at most, before it counts as failed."""
    attempt_timeout_s: float | None = None
    """After so long a request is given up and sent again; null: only ``reward.timeout_s`` ends it."""
    hedge_after_s: float | None = None
    """A request without an answer after so long is sent a second time, the first answer counts; null: never."""
    breaker_failures: int = 8
    """Attempts that fail in a row before a server is left alone and no further prompt is admitted."""
    breaker_pause_s: float = 5.0
    """How long it is left alone before one request probes it."""


@dataclass
class RewardConfig:
    """Rewards and their servers."""

    weights: RewardWeightsConfig = field(default_factory=RewardWeightsConfig)
    objects: str = "grounded_sam"
    """Who names the main objects for the understanding reward: ``grounded_sam`` with its vocabulary,
    ``tagged_grounded_sam`` with the names that Qwen2.5-VL sees, ``qwen_vl`` alone, or ``file`` (``data.tags``)."""
    expert: str = "qwen_vl"
    """Who gives the generation reward: qwen_vl, or the paper's ablations of it: ``perceptual`` (LPIPS, DISTS, PSNR,
    SSIM against the ground truth) and ``generative`` (MUSIQ, MANIQA, CLIPIQA, TOPIQ)."""
    expert_weights: ExpertWeightsConfig = field(default_factory=ExpertWeightsConfig)
    grounded_sam: GroundedSamServerConfig = field(default_factory=GroundedSamServerConfig)
    qwen_vl: VisualExpertServerConfig = field(default_factory=VisualExpertServerConfig)
    iqa: IqaServerConfig = field(default_factory=IqaServerConfig)
    failure_policy: str = "min_viable_group"
    """What becomes of a group in which a reward failed: ``min_viable_group`` (it is trained without the samples that
    have none), ``retry_then_drop`` (scored again, then dropped whole), ``fail_fast`` (the run ends)."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Further rewards: name -> :class:`ExtraRewardConfig` (Hydra cannot override inside a typed mapping; composing
    checks the entries)."""
    min_viable_share: float = 0.75
    """min_viable_group: a group with fewer scored samples than this share is dropped."""
    rescore: int = 1
    """retry_then_drop: times that a group is scored again."""
    url: str | None = None
    """Servers that run on their own (``rl-system serve-rewards``), as http://HOST:8000; null: the run starts its own.
    The token is taken from the environment variable RL_REWARD_TOKEN."""
    timeout_s: float = 120
    """Deadline of one request, retries included."""
    client: RewardClientConfig = field(default_factory=RewardClientConfig)
    start_timeout_s: float = 600


@dataclass
class CoordinationConfig:
    """Asynchrony."""

    max_staleness: int = 1
    """Weight versions between sampling and training of a token; 0: synchronous GRPO."""
    stall_timeout_s: float = 300
    """The run ends with a message if nothing finishes for so long."""


@dataclass
class EvaluationConfig:
    """Held-out prompts, one group each, sampled with the same seeds before and after training."""

    prompts: int = 64
    pictures: int = 8
    """How many of them the report shows."""


@dataclass
class ClusterConfig:
    """Ray."""

    address: str = "local"
    """``local`` starts Ray in this process; ``auto`` joins the cluster that the job runs in."""
    num_cpus: int | None = None
    """Logical CPUs of a local Ray; null: what the machine has."""


@dataclass
class TrainConfig:
    """``rl-system train``."""

    name: str = MISSING
    seed: int = 0
    output_dir: str = "runs"
    """Folder of all runs, or the URI of one that pyarrow opens, as s3://bucket/runs (docs/cluster.md)."""
    scratch_dir: str | None = None
    """Where the working copy of a run lies whose ``output_dir`` is a URI; null: the system's temporary folder."""
    overwrite: bool = False
    """Move an existing run of this name aside instead of refusing."""
    resume: str = "never"
    """``auto``: go on with an unfinished run of this name from its last checkpoint, or start it; ``never``."""
    kept_groups: int = 12
    """How many of the best and of the worst groups are kept with their images."""
    trackers: list[str] = field(default_factory=list)
    """Further places for the metrics: ``wandb``, ``mlflow`` (docs/metrics.md)."""
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    data: DataConfig = field(default_factory=DataConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    grpo: GrpoConfig = field(default_factory=GrpoConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    coordination: CoordinationConfig = field(default_factory=CoordinationConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
