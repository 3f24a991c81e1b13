"""Held-out results in the run directory, so that a report can be made without the run."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rl_system.runs.directory import RunDirectory
from rl_system.runs.evaluated import EvaluatedPrompt, PromptFigures
from rl_system.runs.files import write_json
from rl_system.runs.pictures import write_chain_pictures, write_png

MOMENTS = ("before", "after")


@dataclass(frozen=True)
class StoredEvaluation:
    """An evaluation on disk.

    Attributes:
        folder: holds the pictures that the records name.
        prompts: one record per prompt: row_id, total, components, psnr, ssim, degradation, texts, errors,
            pictures (empty, or file names under lr, hq, coarse, middle, final).
    """

    folder: Path
    prompts: tuple[Mapping[str, Any], ...]

    @property
    def figures(self) -> list[PromptFigures]:
        """Without texts and pictures."""
        names = ("row_id", "total", "components", "psnr", "ssim")
        return [PromptFigures(**{name: record[name] for name in names}) for record in self.prompts]


def write_evaluation(run: RunDirectory, moment: str, prompts: Sequence[EvaluatedPrompt], pictures: int) -> None:
    """Write ``evaluation/MOMENT/``: the figures of every prompt, pictures of the first ``pictures`` of them.

    Args:
        moment: ``before`` or ``after`` training.

    Raises:
        ValueError: any other moment.
    """
    if moment not in MOMENTS:
        raise ValueError(f"moment is {moment!r}; it must be one of {', '.join(MOMENTS)}")
    folder = run.evaluation / moment
    unfinished = folder.with_name(f"{moment}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    records = [_record(p, unfinished, f"{i:04d}" if i < pictures else None) for i, p in enumerate(prompts)]
    write_json(unfinished / "evaluation.json", records)
    shutil.rmtree(folder, ignore_errors=True)
    os.rename(unfinished, folder)


def read_evaluation(run: RunDirectory, moment: str) -> StoredEvaluation | None:
    """What :func:`write_evaluation` wrote, None if it has not."""
    path = run.evaluation / moment / "evaluation.json"
    return StoredEvaluation(path.parent, tuple(json.loads(path.read_text()))) if path.exists() else None


def _record(prompt: EvaluatedPrompt, folder: Path, prefix: str | None) -> dict[str, Any]:
    pictures: dict[str, str] = {}
    if prefix is not None:
        pictures = {"lr": f"{prefix}_lr.png", "hq": f"{prefix}_hq.png"}
        write_png(folder / pictures["lr"], prompt.lr)
        write_png(folder / pictures["hq"], prompt.hq)
        pictures |= write_chain_pictures(folder, prefix, prompt.example.images)
    return {
        "row_id": prompt.row_id,
        "total": prompt.total,
        "components": dict(prompt.components),
        "psnr": prompt.psnr,
        "ssim": prompt.ssim,
        "degradation": prompt.degradation,
        "texts": list(prompt.example.chain.texts),
        "errors": list(prompt.example.chain.errors),
        "pictures": pictures,
    }
