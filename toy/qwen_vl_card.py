"""The model card of the toy visual expert."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from toy.expert_quality import GROUP_SIZE, ExpertFigures


def write_card(folder: Path, settings: dict[str, Any], figures: ExpertFigures, minutes: float) -> None:
    """Write README.md beside the weights."""
    rows = "\n".join(f"| {name} | {value:.3f} |" for name, value in asdict(figures).items())
    used = ", ".join(f"{name} {value}" for name, value in settings.items() if name != "output")
    (folder / "README.md").write_text(
        f"""# Toy visual expert

A Qwen2.5-VL of 1.1 million parameters, fp16, for 64x64 images: shown a degraded photograph and up to 8 restorations,
it answers with quality, realism and consistency (0 to 10) of each one. It understands the one prompt in
`toy/qwen_vl_checkpoint.py` and knows nothing but crops of the photographs in `toy/photographs.yaml`.

Made by `python -m toy.train_qwen_vl` ({used}) in {minutes:.0f} minutes. What the scores mean
and how the training images were made: `toy/judged_images.py`. Figures: `toy/expert_quality.py`, held-out crops,
groups of {GROUP_SIZE}, Spearman correlations of the weighted mean score and mean scores by kind of picture.

| figure | held out |
|---|---|
{rows}
""",
        encoding="utf-8",
    )
