"""Settings of ``rl-system cold-start``. The values are in ``configs/cold_start/``, nothing else has any."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import MISSING, OmegaConf

from actors.spec import RolloutSpec
from learners.spec import LearnerSpec
from rl_system.config.compose import CONFIG_DIR, ConfigError
from rl_system.config.recipes import load_recipe
from rl_system.config.uris import absolute
from vlcot.grpo import LossConfig
from vlcot.policy.family import Family

RECIPES = CONFIG_DIR / "cold_start"


@dataclass
class PolicySettings:
    """What is trained."""

    path: str = MISSING
    """Policy directory: config.json, tokenizer.json and, unless ``random``, model.safetensors."""
    random: bool = MISSING
    """Start from random weights of that configuration."""
    image_tokenizer: str = MISSING
    """VQ image tokenizer; decodes the images of sampled chains."""


@dataclass
class LearnerSettings:
    """DeepSpeed ZeRO-3 learner; the names are those of ``rl-system train``."""

    ranks: int = MISSING
    epochs: float = MISSING
    batch_size: int = MISSING
    """Examples of one step, over all ranks."""
    learning_rate: float = MISSING
    min_learning_rate: float = MISSING
    """Where the cosine ends."""
    warmup_epochs: float = MISSING
    beta1: float = 0.9
    beta2: float = 0.95
    weight_decay: float = MISSING
    z_loss: float = MISSING
    dropout: float = MISSING
    """Of what attention and MLP add to the residual stream."""
    max_grad_norm: float = MISSING
    micro_batch_tokens: int = MISSING
    """Most tokens, padding included, of one forward pass."""
    dtype: str = MISSING
    activation_checkpointing: bool = MISSING
    evaluate_every: int = MISSING
    """Steps between held-out losses."""
    checkpoint_every: int = MISSING
    keep_checkpoints: int = 2
    num_cpus: float = 1
    use_gpu: bool = MISSING
    threads: int = 1
    labels: dict[str, str] = field(default_factory=dict)


@dataclass
class EvaluationSettings:
    """Chains sampled from held-out questions at the end, by vLLM."""

    prompts: int = MISSING
    temperature: float = 1.0
    max_new_tokens: int = MISSING
    num_cpus: float = 1
    num_gpus: float = MISSING
    kv_cache_gib: float = 0.5
    """CPU only."""
    start_timeout_s: float = 900


@dataclass
class ClusterSettings:
    """Where Ray is."""

    address: str = "local"
    num_cpus: int | None = None


@dataclass
class ColdStartConfig:
    """``rl-system cold-start``."""

    name: str = "cold-start"
    output_dir: str = "runs"
    """Folder of all runs, or the URI of one that pyarrow opens, as s3://bucket/runs (docs/cluster.md)."""
    scratch_dir: str | None = None
    """Where the working copy of a run lies whose ``output_dir`` is a URI; null: the system's temporary folder."""
    overwrite: bool = False
    resume: str = "never"
    """never | auto"""
    seed: int = 0
    data: str = ""
    """Folder that ``rl-system prepare-data`` wrote."""
    policy: PolicySettings = field(default_factory=PolicySettings)
    learner: LearnerSettings = field(default_factory=LearnerSettings)
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
    cluster: ClusterSettings = field(default_factory=ClusterSettings)


def load(overrides: Sequence[str]) -> ColdStartConfig:
    """Compose ``recipe=NAME KEY=VALUE ...`` and check.

    Raises:
        ConfigError: no such recipe, unknown key, wrong type, a value or path that cannot be.
    """
    known = sorted(path.stem for path in RECIPES.glob("*.yaml"))
    names = [o.partition("=")[2] for o in overrides if o.startswith("recipe=")]
    if len(names) != 1 or names[0] not in known:
        raise ConfigError(f"say which recipe: recipe={'|'.join(known)}" + (f", not {names[0]}" if names else ""))
    rest = [o for o in overrides if not o.startswith("recipe=")]
    config = load_recipe(ColdStartConfig, RECIPES / f"{names[0]}.yaml", rest)
    _check(config)
    for holder, key in ((config, "data"), (config.policy, "path")):
        setattr(holder, key, str(Path(getattr(holder, key)).resolve()))
    try:
        config.output_dir = absolute(config.output_dir)
    except ValueError as error:
        raise ConfigError(f"output_dir={error}") from None
    if config.scratch_dir is not None:
        config.scratch_dir = str(Path(config.scratch_dir).resolve())
    config.policy.image_tokenizer = str(Path(config.policy.image_tokenizer).resolve())
    return config


def _check(config: ColdStartConfig) -> None:
    if config.resume not in ("never", "auto"):
        raise ConfigError(f"resume={config.resume} is neither never nor auto")
    if not config.data:
        raise ConfigError("data=DIR is missing: the folder that `rl-system prepare-data` wrote")
    learner = config.learner
    if not 0 <= learner.dropout < 1:
        raise ConfigError(f"learner.dropout={learner.dropout} must lie in [0, 1)")
    if learner.z_loss < 0:
        raise ConfigError(f"learner.z_loss={learner.z_loss} must not be negative")
    for name in ("batch_size", "evaluate_every", "checkpoint_every"):
        if getattr(learner, name) < 1:
            raise ConfigError(f"learner.{name}={getattr(learner, name)} is too small: it must be at least 1")
    if learner.epochs <= 0 or learner.warmup_epochs < 0:
        raise ConfigError(f"learner.epochs={learner.epochs} must be positive and warmup_epochs not negative")
    if config.evaluation.prompts < 1:
        raise ConfigError(f"evaluation.prompts={config.evaluation.prompts} is too small: it must be at least 1")
    path = Path(config.policy.path)
    if not config.policy.random and not list(path.glob("*.safetensors")):
        raise ConfigError(f"policy.path={path} has no .safetensors file; policy.random=true starts without")
    try:
        Family.from_pretrained(path)
        sampling_spec(config, str(path))
    except (ValueError, FileNotFoundError) as error:
        raise ConfigError(f"policy.path={path}: {error}") from None


def learner_spec(config: ColdStartConfig, policy_path: str, rows: int) -> LearnerSpec:
    """Settings of the learner group for a training split of ``rows`` examples.

    Raises:
        ValueError: the epochs make no step, or a value that the learner refuses.
    """
    learner = config.learner
    steps = int(learner.epochs * rows / learner.batch_size)
    if steps < 1:
        raise ValueError(
            f"learner.epochs={learner.epochs:g} of {rows} examples do not fill one batch of {learner.batch_size}"
        )
    return LearnerSpec(
        policy_path=policy_path,
        reference_path=None,
        steps=steps,
        groups_per_step=learner.batch_size,
        temperature=1.0,
        max_staleness=0,
        ranks=learner.ranks,
        learning_rate=learner.learning_rate,
        min_learning_rate=learner.min_learning_rate,
        betas=(learner.beta1, learner.beta2),
        weight_decay=learner.weight_decay,
        warmup_steps=min(steps, round(learner.warmup_epochs * rows / learner.batch_size)),
        schedule="cosine",
        max_grad_norm=learner.max_grad_norm,
        micro_batch_tokens=learner.micro_batch_tokens,
        dtype=learner.dtype,  # type: ignore[arg-type]
        activation_checkpointing=learner.activation_checkpointing,
        seed=config.seed,
        threads=learner.threads,
        checkpoint_every=learner.checkpoint_every,
        keep_checkpoints=learner.keep_checkpoints,
        use_gpu=learner.use_gpu,
        loss=LossConfig(kl_beta=0.0),
    )


def sampling_spec(config: ColdStartConfig, policy: str) -> RolloutSpec:
    """How held-out chains are sampled from the directory ``policy``."""
    evaluation = config.evaluation
    return RolloutSpec(
        policy=policy,
        image_tokenizer=config.policy.image_tokenizer,
        group_size=1,
        temperature=evaluation.temperature,
        max_new_tokens=evaluation.max_new_tokens,
        kv_cache_gib=None if evaluation.num_gpus else evaluation.kv_cache_gib,
        dtype=config.learner.dtype,
        seed=config.seed,
    )


def to_yaml(config: ColdStartConfig) -> str:
    """The resolved configuration."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))
