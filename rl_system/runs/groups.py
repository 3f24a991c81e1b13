"""Keeps the best and the worst groups of a run, with texts, images and every reward."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rl_system.runs.files import write_json
from rl_system.runs.pictures import write_chain_pictures, write_png
from vlcot.groups import Absent, Sample, Score, Scored, ScoredGroup

_RECORD = "group.json"
_UNFINISHED = ".unfinished"


@dataclass(frozen=True)
class KeptGroup:
    """A group on disk.

    Attributes:
        folder: holds the pictures that ``record`` names.
        record: content of ``group.json``.
    """

    folder: Path
    record: Mapping[str, Any]

    @property
    def mean_total(self) -> float:
        """Mean total reward of the valid samples."""
        return float(self.record["mean_total"])


class GroupStore:
    """The ``keep`` best and ``keep`` worst groups by mean total of the valid samples, one folder each.

    A store opened on a directory goes on with what is there. Among equal groups the earlier one stays.
    """

    def __init__(self, directory: Path, keep: int) -> None:
        if keep < 1:
            raise ValueError(f"keep={keep} must be at least 1")
        self._directory = directory
        self._keep = keep
        directory.mkdir(parents=True, exist_ok=True)
        self._kept = {group.folder: group.mean_total for group in read_groups(directory)}
        self._next = 1 + max((int(folder.name) for folder in self._kept), default=-1)

    def offer(self, scored: ScoredGroup) -> bool:
        """Keep ``scored`` if it is among the best or the worst, in place of another; whether it was kept.

        A group without a valid sample has no mean and is not kept.
        """
        if not scored.valid.any():
            return False
        mean = float(scored.totals[scored.valid].mean())
        folder = self._directory / f"{self._next:06d}"
        candidates = self._kept | {folder: mean}
        best = sorted(candidates, key=lambda f: (-candidates[f], f.name))[: self._keep]
        worst = sorted(candidates, key=lambda f: (candidates[f], f.name))[: self._keep]
        chosen = {*best, *worst}
        if folder not in chosen:
            return False
        self._next += 1
        _write_group(folder, scored, mean)
        for dropped in self._kept.keys() - chosen:
            shutil.rmtree(dropped)
        self._kept = {f: m for f, m in candidates.items() if f in chosen}
        return True


def read_groups(directory: Path) -> list[KeptGroup]:
    """The kept groups, best first; none if there is no such directory."""
    groups = []
    for folder in sorted(p for p in directory.glob("[0-9]*") if p.suffix != _UNFINISHED):
        try:
            groups.append(KeptGroup(folder, json.loads((folder / _RECORD).read_text())))
        except FileNotFoundError:  # a running store has just replaced it
            continue
    return sorted(groups, key=lambda group: -group.mean_total)


def score_record(score: Score) -> dict[str, Any]:
    """A reward as JSON: ``kind`` scored | absent | failed, with value and detail, or the reason."""
    if isinstance(score, Scored):
        return {"kind": "scored", "value": score.value, "detail": dict(score.detail)}
    return {"kind": "absent" if isinstance(score, Absent) else "failed", "reason": score.reason}


def _write_group(folder: Path, scored: ScoredGroup, mean: float) -> None:
    """Write beside, then move into place: a folder with a number is complete."""
    unfinished = folder.with_name(folder.name + _UNFINISHED)
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    prompt = scored.group.prompt
    write_png(unfinished / "lr.png", prompt.lr_image)
    samples = [
        _sample_record(sample)
        | {
            "pictures": write_chain_pictures(unfinished, f"sample{i}", sample.images),
            "rewards": {name: score_record(score) for name, score in scores.items()},
            "total": float(total) if valid else None,
            "valid": bool(valid),
        }
        for i, (sample, scores, total, valid) in enumerate(
            zip(scored.group.samples, scored.scores, scored.totals, scored.valid, strict=True)
        )
    ]
    record = {
        "group_id": prompt.group_id,
        "row_id": prompt.row_id,
        "seed": int(prompt.seed),
        "degradation": prompt.degradation,
        "objects": list(scored.objects),
        "mean_total": mean,
        "actor": scored.group.actor,
        "generation_s": scored.group.generation_s,
        "reward_s": dict(scored.reward_s),
        "samples": samples,
    }
    write_json(unfinished / _RECORD, record)
    os.rename(unfinished, folder)


def _sample_record(sample: Sample) -> dict[str, Any]:
    return {
        "texts": list(sample.chain.texts),
        "errors": list(sample.chain.errors),
        "finish_reason": sample.finish_reason,
        "tokens": len(sample.ids),
        "versions": [asdict(span) for span in sample.versions],
    }
