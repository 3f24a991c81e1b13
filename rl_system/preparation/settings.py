"""Settings of ``rl-system prepare-data``. The values are in ``configs/prepare.yaml``, nothing else has any."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, cast

import yaml
from omegaconf import MISSING

from rl_system.config.compose import CONFIG_DIR, ConfigError
from rl_system.config.recipes import load_recipe
from rl_system.data.prepared import sha256_of
from vlcot.degradation import SEESR_LIGHT, SEESR_TRAINING, DegradationConfig
from vlcot.policy.family import Family, read_config
from vlcot.sequence import IMAGE_PLACEHOLDER

PRESETS = {"seesr_training": SEESR_TRAINING, "seesr_light": SEESR_LIGHT}
SERVER_CAPTIONS, SERVER_OBJECTS = "qwen_vl", "grounded_sam"
_WHERE_AND_HOW_FAST = ("input", "output", "policy", "image_tokenizer", "captions", "objects", "url")
_NOT_CONTENT = (*_WHERE_AND_HOW_FAST, "server_timeout_s", "workers", "degradation", "sharpen_target")


@dataclass
class PrepareConfig:
    """``rl-system prepare-data``."""

    input: str = ""
    """Folder tree of photographs."""
    output: str = ""
    """Folder to write, or to go on with."""
    policy: str = MISSING
    """Policy directory: its tokenizer and its layout (image sizes)."""
    image_tokenizer: str = MISSING
    """Directory of the VQ image tokenizer."""
    instruction: str = MISSING
    """The question; ``<|image|>`` stands for the LR image."""
    seed: int = MISSING
    samples_per_image: int = MISSING
    """Crops, each with a degradation of its own, of every photograph."""
    crop: int | None = MISSING
    """Side of the crop in pixels of the photograph, a multiple of the policy's full size, to which it is averaged
    down; null: the full size itself."""
    min_pixels: int = MISSING
    """Photographs with fewer pixels are left out."""
    min_file_kib: float = MISSING
    """Files of fewer KiB are left out: they were compressed too hard."""
    degradation: str = MISSING
    """``seesr_training``, ``seesr_light``, or a YAML file with ``base`` and the values to change in it."""
    sharpen_target: bool | None = MISSING
    """USM of the target; null: as the degradation says."""
    captions: str | None = MISSING
    """JSON lines file, or ``qwen_vl`` for the server at ``url``."""
    objects: str | None = MISSING
    """JSON lines file, ``grounded_sam`` for the server at ``url``; null: without objects."""
    url: str | None = MISSING
    """Reward servers (``rl-system serve-rewards``); the token is in RL_REWARD_TOKEN."""
    server_timeout_s: float = MISSING
    """Deadline of one request, retries included."""
    images_per_shard: int = MISSING
    workers: int | None = MISSING
    """Processes, one core each; null: as many as there are cores."""


def load(overrides: Sequence[str]) -> PrepareConfig:
    """Compose and check.

    Args:
        overrides: ``key=value``.

    Raises:
        ConfigError: unknown key, wrong type, a value or path that cannot be.
    """
    config = load_recipe(PrepareConfig, CONFIG_DIR / "prepare.yaml", overrides)
    _check(config)
    for name in ("input", "output", "policy", "image_tokenizer"):
        setattr(config, name, str(Path(getattr(config, name)).resolve()))
    return config


def _check(config: PrepareConfig) -> None:
    for name in ("input", "output"):
        if not getattr(config, name):
            raise ConfigError("say where from and where to: rl-system prepare-data input=DIR output=DIR")
    if not Path(config.input).is_dir():
        raise ConfigError(f"input={config.input}: no such folder")
    if Path(config.output).resolve().is_relative_to(Path(config.input).resolve()):
        raise ConfigError(f"output={config.output} lies inside input: what it writes would be scanned as photographs")
    at_least = {"seed": 0, "samples_per_image": 1, "min_pixels": 0, "images_per_shard": 1, "workers": 1}
    for name, low in at_least.items():
        if (value := getattr(config, name)) is not None and value < low:
            raise ConfigError(f"{name}={value} is too small: it must be at least {low}")
    if not 0 <= config.min_file_kib < math.inf:
        raise ConfigError(f"min_file_kib={config.min_file_kib:g} must not be negative")
    if not 0 < config.server_timeout_s < math.inf:
        raise ConfigError(f"server_timeout_s={config.server_timeout_s:g} must be positive and finite")
    if config.instruction.count(IMAGE_PLACEHOLDER) != 1:
        raise ConfigError(f"instruction must contain {IMAGE_PLACEHOLDER} exactly once: {config.instruction!r}")
    _check_texts(config)
    degradation(config)
    policy = family(config)
    full = policy.layout.full_size
    if config.crop is not None and (config.crop < full or config.crop % full):
        raise ConfigError(f"crop={config.crop} must be a multiple of the policy's full size {full}")
    _check_image_tokenizer(config.image_tokenizer, policy)


def _check_image_tokenizer(path: str, policy: Family) -> None:
    try:
        given = read_config(path)
        found = 2 ** (len(given["channel_multiplier"]) - 1), int(given["num_embeddings"])
    except (ValueError, FileNotFoundError, KeyError, TypeError) as error:
        raise ConfigError(f"image_tokenizer={path}: no VQ checkpoint there: {error}") from None
    needed = policy.layout.downsample, len(policy.vocabulary.image_ids)
    if found != needed:
        raise ConfigError(
            f"image_tokenizer={path} has {found[0]} pixels a code and {found[1]} codes, the policy's sequences have "
            f"{needed[0]} and {needed[1]}"
        )


def _check_texts(config: PrepareConfig) -> None:
    if config.captions is None:
        raise ConfigError("a VLCoT needs captions: captions=FILE.jsonl, or captions=qwen_vl url=http://HOST:8000")
    served = [
        f"{name}={kind}"
        for name, kind in (("captions", SERVER_CAPTIONS), ("objects", SERVER_OBJECTS))
        if getattr(config, name) == kind
    ]
    for name, kind in (("captions", SERVER_CAPTIONS), ("objects", SERVER_OBJECTS)):
        value = getattr(config, name)
        if value not in (None, kind) and not Path(value).is_file():
            raise ConfigError(f"{name}={value}: no such file (or `{kind}` for the server)")
    if served and (config.url is None or not re.fullmatch(r"https?://[^/\s?#]+(/[^\s?#]*)?", config.url)):
        raise ConfigError(f"{' and '.join(served)} needs url=http://HOST:8000, the address of the reward servers")
    if config.url is not None and not served:
        raise ConfigError(f"url={config.url} has no use: captions and objects come from files")


def family(config: PrepareConfig) -> Family:
    """The policy's tokenizer and layout. ConfigError if the directory is none."""
    try:
        return Family.from_pretrained(config.policy)
    except (ValueError, FileNotFoundError) as error:
        raise ConfigError(f"policy={config.policy}: {error}") from error


def degradation(config: PrepareConfig) -> DegradationConfig:
    """What the samples are degraded with.

    Raises:
        ConfigError: neither a preset nor a readable file, an unknown key, or impossible values.
    """
    chosen = PRESETS.get(config.degradation) or _custom(config.degradation)
    return chosen if config.sharpen_target is None else replace(chosen, sharpen_target=config.sharpen_target)


def _custom(name: str) -> DegradationConfig:
    path = Path(name)
    if not path.is_file():
        raise ConfigError(f"degradation={name} is none of {', '.join(PRESETS)} and no file")
    try:
        given = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not isinstance(given, dict) or given.get("base") not in PRESETS:
            raise ValueError(f"it must be a mapping with base: {' | '.join(PRESETS)}")
        base = PRESETS[given.pop("base")]
        for stage in ("stage1", "stage2"):
            if stage in given:
                given[stage] = _changed(getattr(base, stage), given[stage], f"{stage}.")
        return cast(DegradationConfig, _changed(base, given, ""))
    except (ValueError, TypeError, yaml.YAMLError) as error:
        raise ConfigError(f"degradation={name}: {' '.join(str(error).split())}") from None


def _changed(base: Any, given: Any, where: str) -> Any:
    known = [field.name for field in fields(base)]
    if not isinstance(given, Mapping) or not given.keys() <= set(known):
        unknown = [f"{where}{key}" for key in given if key not in known] if isinstance(given, Mapping) else [where]
        raise ValueError(f"unknown: {', '.join(unknown)}; known keys: {', '.join(known)}")
    return replace(base, **{key: tuple(v) if isinstance(v, list) else v for key, v in given.items()})


def identity(config: PrepareConfig) -> dict[str, Any]:
    """Everything that decides the bytes of a row, for ``config.yaml``; without paths and numbers of processes."""
    chosen = {key: value for key, value in asdict(config).items() if key not in _NOT_CONTENT}
    files = {
        "policy_tokenizer_sha256": Path(config.policy) / "tokenizer.json",
        "policy_config_sha256": Path(config.policy) / "config.json",
        "image_tokenizer_sha256": Path(config.image_tokenizer) / "model.safetensors",
    }
    sources = {
        "captions_from": SERVER_CAPTIONS if config.captions == SERVER_CAPTIONS else "file",
        "objects_from": config.objects if config.objects in (None, SERVER_OBJECTS) else "file",
    }
    drawn = yaml.safe_load(yaml.safe_dump(_lists(asdict(degradation(config)))))
    return chosen | sources | {key: sha256_of(path) for key, path in files.items()} | {"degradation": drawn}


def _lists(node: Any) -> Any:
    if isinstance(node, dict):
        return {key: _lists(value) for key, value in node.items()}
    return [_lists(value) for value in node] if isinstance(node, tuple | list) else node
