"""The commands of a study, in order. Each is an ``rl-system`` command that can be stopped and called again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rl_system.config.compose import compose_config
from rl_system.studies.ablate.settings import AblateConfig, VariantConfig, blocks, chosen_variants
from vlcot.policy.family import Family

DATA_SET = "test"
"""Name of the test images in the evaluation."""


@dataclass(frozen=True)
class Stage:
    """One command. ``name`` is unique in a study and names its log."""

    name: str
    command: tuple[str, ...]


@dataclass(frozen=True)
class Result:
    """What one variant gives with one seed.

    Attributes:
        method: its name in the evaluation.
        policy: the policy that restores.
        run: directory of the ``train`` run with its figures on held-out prompts, None where there is none.
        moment: ``after`` training, or ``before`` it for the cold-started policy.
        restored: folder of its restorations.
    """

    variant: str
    seed: int
    method: str
    policy: Path
    run: Path | None
    moment: str
    restored: Path


@dataclass(frozen=True)
class Plan:
    """All of a study. ``layouts``: name -> blocks of the chains, one policy directory each."""

    layouts: dict[str, tuple[str, ...]]
    stages: tuple[Stage, ...]
    results: tuple[Result, ...]


def layout_name(config: AblateConfig, variant: VariantConfig) -> str:
    """Variants that leave out the same blocks share data and cold start, under the name of the first."""
    return next(name for name, v in config.variants.items() if sorted(v.without) == sorted(variant.without))


def make_plan(config: AblateConfig) -> Plan:
    """Data and cold start of each layout, then GRPO, restorations and one evaluation of all."""
    family, variants = Family.from_pretrained(config.policy), chosen_variants(config)
    layouts = {layout_name(config, v): blocks(family, v) for v in variants.values()}
    stages = [_prepare(config, layout) for layout in layouts]
    results = []
    for seed in config.seeds:
        stages += [_cold_start(config, layout, seed) for layout in layouts]
        for name, variant in variants.items():
            if variant.train is not None:
                stages.append(_train(config, name, variant, seed))
            results.append(_result(config, name, variant, seed))
    instruction = compose_config([o.replace("{data}", ".") for o in config.train]).policy.instruction
    stages += [_restore(config, result, instruction) for result in results]
    stages.append(_evaluate(config, results))
    return Plan(layouts, tuple(stages), tuple(results))


def policy_directory(config: AblateConfig, layout: str) -> Path:
    """Configuration and tokenizer of a layout."""
    return Path(config.output) / "layouts" / layout


def _data(config: AblateConfig, layout: str) -> Path:
    return Path(config.output) / "data" / layout


def _cold_policy(config: AblateConfig, layout: str, seed: int) -> Path:
    name = f"{layout}-{seed}"
    return Path(config.output) / "cold-start" / name / "checkpoints" / name / "policy"


def _prepare(config: AblateConfig, layout: str) -> Stage:
    return _stage(
        f"prepare-{layout}",
        "prepare-data",
        f"input={config.photographs}",
        f"output={_data(config, layout)}",
        f"captions={config.captions}",
        *([f"objects={config.objects}"] if config.objects else []),
        f"policy={policy_directory(config, layout)}",
        f"image_tokenizer={config.image_tokenizer}",
        *config.prepare,
    )


def _cold_start(config: AblateConfig, layout: str, seed: int) -> Stage:
    return _stage(
        f"cold-start-{layout}-{seed}",
        "cold-start",
        f"data={_data(config, layout)}",
        f"policy.path={policy_directory(config, layout)}",
        f"policy.image_tokenizer={config.image_tokenizer}",
        f"output_dir={Path(config.output) / 'cold-start'}",
        f"name={layout}-{seed}",
        f"seed={seed}",
        "resume=auto",
        *config.cold_start,
    )


def _train(config: AblateConfig, name: str, variant: VariantConfig, seed: int) -> Stage:
    layout = layout_name(config, variant)
    overrides = [o.replace("{data}", str(_data(config, layout))) for o in (*config.train, *(variant.train or ()))]
    return _stage(
        f"train-{name}-{seed}",
        "train",
        *overrides,
        f"policy.path={_cold_policy(config, layout, seed)}",
        f"policy.image_tokenizer={config.image_tokenizer}",
        f"output_dir={Path(config.output) / 'train'}",
        f"name={name}-{seed}",
        f"seed={seed}",
        "resume=auto",
    )


def _result(config: AblateConfig, name: str, variant: VariantConfig, seed: int) -> Result:
    output, method, layout = Path(config.output), f"{name}-{seed}", layout_name(config, variant)
    restored = output / "restored" / method
    if variant.train is not None:
        run = output / "train" / method
        return Result(name, seed, method, run / "checkpoints" / method / "policy", run, "after", restored)
    # A policy before GRPO was measured at the start of whichever run began with it.
    starts = [n for n, v in chosen_variants(config).items() if v.train is not None and layout_name(config, v) == layout]
    starts.sort(key=lambda n: n != config.base)
    run_before = output / "train" / f"{starts[0]}-{seed}" if starts else None
    return Result(name, seed, method, _cold_policy(config, layout, seed), run_before, "before", restored)


def _restore(config: AblateConfig, result: Result, instruction: str) -> Stage:
    return _stage(
        f"restore-{result.method}",
        "restore",
        *("--input", config.test_lr, "--output", str(result.restored), "--checkpoint", str(result.policy)),
        *("--image-tokenizer", config.image_tokenizer, "--instruction", instruction),
        *("--seed", str(result.seed), "--skip-existing"),
        *config.restore,
    )


def _evaluate(config: AblateConfig, results: Sequence[Result]) -> Stage:
    methods = [part for r in results for part in ("--method", f"{r.method}={r.restored}")]
    output = Path(config.output) / "evaluation"
    references = f"{DATA_SET}={config.test_hr}"
    return _stage("evaluate", "evaluate", "--data", references, *methods, "--output", str(output), *config.evaluate)


def _stage(name: str, *command: str) -> Stage:
    return Stage(name, command)
