"""Held-out prompts through the same actors and servers, with the same seeds each time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from actors.pool import RolloutPool
from rl_system.coordination.scoring import Scorer
from rl_system.data.prompts import PromptBuilder
from rl_system.data.rows import Row, RowSource
from rl_system.runs.evaluated import EvaluatedPrompt
from vlcot import metrics
from vlcot.groups import Prompt, Scored, ScoredGroup
from vlcot.rewards import component_names


@dataclass(frozen=True, eq=False)
class HeldOut:
    """Rows and prompts of the held-out set of one run."""

    rows: tuple[Row, ...]
    prompts: tuple[Prompt, ...]

    @classmethod
    def of(cls, source: RowSource, builder: PromptBuilder, count: int, seed: int) -> HeldOut:
        """The first ``count`` held-out rows; sampling seeds come from ``seed`` and the row's place."""
        rows = tuple(source.row(index, "heldout") for index in range(count))
        seeds = np.random.default_rng([seed, 2]).integers(2**31, size=count).tolist()
        prompts = tuple(builder.build(r, f"heldout/{r.row_id}", s) for r, s in zip(rows, seeds, strict=True))
        return cls(rows, prompts)


async def evaluate(
    held_out: HeldOut, pool: RolloutPool, scorer: Scorer, done: Callable[[int], None]
) -> list[EvaluatedPrompt]:
    """Sample and score every held-out prompt.

    Args:
        done: called with the number of finished prompts.

    Raises:
        RuntimeError: a reward failed on every sample of a prompt: an evaluation has no holes.
    """
    finished = 0

    async def one(prompt: Prompt, row: Row) -> EvaluatedPrompt:
        nonlocal finished
        objects = scorer.find_objects(prompt)
        scored = await scorer.score(await pool.generate(prompt), objects)
        finished += 1
        done(finished)
        return _evaluated(scored, row)

    return list(await asyncio.gather(*(one(p, r) for p, r in zip(held_out.prompts, held_out.rows, strict=True))))


def _evaluated(scored: ScoredGroup, row: Row) -> EvaluatedPrompt:
    if not scored.valid.any():
        raise RuntimeError(f"evaluation: no sample of {row.row_id} has a reward: {scored.scores[0]}")
    finals = [s.images[-1] for s in scored.group.samples if s.images[-1] is not None]
    return EvaluatedPrompt(
        row_id=row.row_id,
        total=float(scored.totals[scored.valid].mean()),
        components={name: _component_mean(scored, name) for name in component_names(scored.scores[0])},
        psnr=_mean([metrics.psnr(image, row.hq) for image in finals]),
        ssim=_mean([metrics.ssim(image, row.hq) for image in finals]),
        lr=row.lr,
        hq=row.hq,
        degradation=row.degradation,
        example=scored.group.samples[0],
    )


def _component_mean(scored: ScoredGroup, name: str) -> float | None:
    return _mean([score.value for scores in scored.scores if isinstance(score := scores[name], Scored)])


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None
