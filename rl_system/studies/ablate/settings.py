"""Settings of ``rl-system ablate``. The values are in ``configs/ablation/``, nothing else has any."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from omegaconf import MISSING

from rl_system.config.compose import CONFIG_DIR, ConfigError
from rl_system.config.recipes import load_recipe
from vlcot.policy.family import Family

STUDIES = CONFIG_DIR / "ablation"
_NAME = re.compile(r"[a-z][a-z0-9_]{0,31}")


@dataclass
class VariantConfig:
    """One column of a table."""

    title: str = MISSING
    without: list[str] = field(default_factory=list)
    """Blocks that its chains leave out (:class:`vlcot.sequence.Layout`)."""
    train: list[str] | None = field(default_factory=list)
    """Overrides of ``train``; null: the cold-started policy as it is."""


@dataclass
class AblateConfig:
    """``rl-system ablate``."""

    output: str = ""
    """Folder of the study."""
    photographs: str = ""
    """What the cold starts learn from: ``input`` of ``prepare-data``."""
    captions: str = ""
    """Its captions: a JSON lines file, or ``qwen_vl``."""
    objects: str | None = None
    """Their main objects, as ``prepare-data`` takes them; for the variant ``objects_file``."""
    test_lr: str = ""
    """LR images that every variant restores."""
    test_hr: str = ""
    """Their ground truths, of the same names; a quarter of their side is the LR image's."""
    seeds: list[int] = MISSING
    only: list[str] = field(default_factory=list)
    """Variants to run; empty: all."""
    base: str = MISSING
    """The variant that the others are compared with."""
    policy: str = MISSING
    """Policy directory: configuration and tokenizer of all variants, and the weights that a recipe may start from."""
    image_tokenizer: str = MISSING
    prepare: list[str] = field(default_factory=list)
    """Overrides of ``prepare-data``."""
    cold_start: list[str] = field(default_factory=list)
    """Overrides of ``cold-start``, the recipe among them."""
    train: list[str] = field(default_factory=list)
    """Overrides of every ``train``, the experiment among them; ``{data}`` is the prepared folder."""
    restore: list[str] = field(default_factory=list)
    """Options of every ``restore``."""
    evaluate: list[str] = field(default_factory=list)
    """Options of ``evaluate``, such as ``--weights DIR``."""
    variants: dict[str, VariantConfig] = field(default_factory=dict)
    tables: dict[str, list[str]] = field(default_factory=dict)
    """Title of a table -> its variants, without the base."""


def load(overrides: Sequence[str]) -> AblateConfig:
    """Compose and check.

    Args:
        overrides: ``study=NAME`` and ``key=value``.

    Raises:
        ConfigError: unknown study or key, a variant or path that cannot be.
    """
    studies = sorted(path.stem for path in STUDIES.glob("*.yaml"))
    chosen = [o.removeprefix("study=") for o in overrides if o.startswith("study=")]
    if len(chosen) != 1 or chosen[0] not in studies:
        raise ConfigError(f"choose one study={'|'.join(studies)}" + (f", not {', '.join(chosen)}" if chosen else ""))
    rest = [o for o in overrides if not o.startswith("study=")]
    config = load_recipe(AblateConfig, STUDIES / f"{chosen[0]}.yaml", rest)
    check(config)
    return config


def check(config: AblateConfig) -> None:
    """Refuse what cannot be run.

    Raises:
        ConfigError: naming the key.
    """
    for key in ("output", "photographs", "captions", "test_lr", "test_hr"):
        if not getattr(config, key):
            raise ConfigError(f"{key}=... is missing")
    for key in ("photographs", "test_lr", "test_hr"):
        if not Path(getattr(config, key)).is_dir():
            raise ConfigError(f"{key}={getattr(config, key)}: there is no such folder")
    if not config.seeds or len(set(config.seeds)) < len(config.seeds) or min(config.seeds) < 0:
        raise ConfigError(f"seeds={config.seeds} must be different numbers from 0")
    _check_variants(config)


def _check_variants(config: AblateConfig) -> None:
    named = {config.base, *config.only, *(name for names in config.tables.values() for name in names)}
    if unknown := sorted(named - config.variants.keys()):
        raise ConfigError(f"no variant {', '.join(unknown)}; there are {', '.join(config.variants)}")
    if config.only and config.base not in config.only:
        raise ConfigError(f"only={config.only} lacks {config.base}, with which the others are compared")
    try:
        family = Family.from_pretrained(config.policy)
        for name, variant in config.variants.items():
            if not _NAME.fullmatch(name):
                raise ConfigError(f"variants.{name}: a name has small letters, digits and '_', 32 at most")
            if missing := sorted(set(variant.without) - set(family.layout.blocks)):
                raise ConfigError(f"variants.{name}.without: the chain has no {', '.join(missing)}")
            replace(family.layout, blocks=blocks(family, variant))
    except FileNotFoundError as error:
        raise ConfigError(f"policy={config.policy}: {error}") from None
    except ValueError as error:
        raise error if isinstance(error, ConfigError) else ConfigError(f"variants.{name}: {error}") from None


def blocks(family: Family, variant: VariantConfig) -> tuple[str, ...]:
    """The blocks of a variant's chains."""
    return tuple(tag for tag in family.layout.blocks if tag not in variant.without)


def chosen_variants(config: AblateConfig) -> dict[str, VariantConfig]:
    """Those to run, in the order of the file."""
    return {name: v for name, v in config.variants.items() if not config.only or name in config.only}
