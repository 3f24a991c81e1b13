"""Log-probs over the ids that the grammar allows, in chunks that backward computes again.

An image position has 16,384 choices, not 73,728; text has no image ids. Only the allowed rows of the head are
multiplied, as slices and not as copies, and only one chunk's logits exist at a time, so no [tokens, vocabulary] tensor
ever does. Forward keeps one number a token, the log-sum-exp.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from vlcot.grammar import CHOICES, Grammar, Support

CHUNK_TOKENS = 512
"""Tokens whose logits exist at a time: 32 MiB of float32 over the 7B's 16,384 codes."""

Slices = tuple[slice, ...]


@dataclass(frozen=True, eq=False)
class SupportTable:
    """The ids of each support.

    Attributes:
        slices: support -> runs of neighbouring ids, in ascending order.
        index: support -> int64 [vocabulary], place of an id in the runs, one after another; -1 where it is not allowed.
    """

    slices: dict[Support, Slices]
    index: dict[Support, torch.Tensor]

    @classmethod
    def of(cls, grammar: Grammar, device: torch.device | str = "cpu") -> SupportTable:
        """The table of ``grammar``'s choices."""
        slices, index = {}, {}
        for support in CHOICES:
            ids = np.sort(grammar.support_ids(support))
            place = np.full(grammar.vocabulary.size, -1, dtype=np.int64)
            place[ids] = np.arange(len(ids))
            runs = np.split(ids, np.flatnonzero(np.diff(ids) > 1) + 1)
            slices[support] = tuple(slice(int(run[0]), int(run[-1]) + 1) for run in runs)
            index[support] = torch.from_numpy(place).to(device)
        return cls(slices, index)


def support_logprobs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    table: SupportTable,
    ids: torch.Tensor,
    supports: torch.Tensor,
    temperature: float,
) -> torch.Tensor:
    """log softmax(hidden @ weight[allowed].T / temperature) at ``ids``: the first of :func:`support_scores`."""
    return support_scores(hidden, weight, table, ids, supports, temperature)[0]


def support_scores(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    table: SupportTable,
    ids: torch.Tensor,
    supports: torch.Tensor,
    temperature: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs of ``ids`` under softmax(hidden @ weight[allowed].T / temperature), and its log-sum-exp.

    Args:
        hidden: [T, d], any float dtype.
        weight: [vocabulary, d] rows of the head.
        ids: int64 [T]; must be allowed by their support.
        supports: uint8 [T] of :class:`Support`.
        temperature: positive.

    Returns:
        Two float32 [T], 0 at FORCED positions. Not differentiable twice.

    Raises:
        ValueError: an id is outside its support, or the temperature is not positive.
    """
    if temperature <= 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    parts = []
    for support, slices in table.slices.items():
        positions = (supports == int(support)).nonzero().squeeze(1)
        targets = table.index[support][ids[positions]]
        if bool((targets < 0).any()):
            bad = int(ids[positions][targets < 0][0])
            raise ValueError(f"id {bad} is outside of support {support.name}")
        if positions.numel():
            parts.append((slices, positions, targets))
    return _SupportLogprobs.apply(hidden, weight, parts, temperature)


class _SupportLogprobs(torch.autograd.Function):
    """d log p(target) / d logit = ([id is target] - p(id)) / temperature; p comes from the kept log-sum-exp, whose
    own derivative is p(id) / temperature."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, parts: list, temperature: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        logprobs = torch.zeros(len(hidden), dtype=torch.float32, device=hidden.device)
        logsumexp = torch.zeros_like(logprobs)
        for slices, chunk, targets in _chunks(parts):
            logits = support_logits(hidden[chunk], weight, slices, temperature)
            logsumexp[chunk] = logits.logsumexp(1)
            logprobs[chunk] = logits.gather(1, targets[:, None]).squeeze(1) - logsumexp[chunk]
        ctx.save_for_backward(hidden, weight, logsumexp)
        ctx.parts, ctx.temperature = parts, temperature
        return logprobs, logsumexp

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None, None]:
        hidden, weight, logsumexp = ctx.saved_tensors
        scale, of_sum = (gradient / ctx.temperature for gradient in upstream)
        hidden_gradient = torch.zeros_like(hidden)
        # float32 whatever the weight's dtype: chunk upon chunk is added to it. None for a frozen head.
        weight_gradient = None
        if ctx.needs_input_grad[1]:
            weight_gradient = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        for slices, chunk, targets in _chunks(ctx.parts):
            rows = hidden[chunk]
            gradient = support_logits(rows, weight, slices, ctx.temperature).sub_(logsumexp[chunk, None]).exp_()
            gradient.mul_((of_sum - scale)[chunk, None]).scatter_add_(1, targets[:, None], scale[chunk, None])
            gradient = gradient.to(hidden.dtype)
            for ids, columns in _columns(slices):
                hidden_gradient[chunk] += gradient[:, columns] @ weight[ids]
                if weight_gradient is not None:
                    _add_product(weight_gradient[ids], gradient[:, columns].T, rows)
        return hidden_gradient, None if weight_gradient is None else weight_gradient.to(weight.dtype), None, None


def _chunks(parts: list) -> Iterator[tuple[Slices, torch.Tensor, torch.Tensor]]:
    for slices, positions, targets in parts:
        for chunk, wanted in zip(positions.split(CHUNK_TOKENS), targets.split(CHUNK_TOKENS), strict=True):
            yield slices, chunk, wanted


def _columns(slices: Slices) -> Iterator[tuple[slice, slice]]:
    """Rows of the head, and where their logits stand."""
    start = 0
    for ids in slices:
        end = start + ids.stop - ids.start
        yield ids, slice(start, end)
        start = end


def support_logits(hidden: torch.Tensor, weight: torch.Tensor, slices: Slices, temperature: float) -> torch.Tensor:
    """hidden [tokens, d] @ weight[allowed].T / temperature, float32 [tokens, allowed], ids in ascending order."""
    width = sum(ids.stop - ids.start for ids in slices)
    logits = torch.empty(len(hidden), width, dtype=torch.float32, device=hidden.device)
    for ids, columns in _columns(slices):
        logits[:, columns] = hidden @ weight[ids].T
    return logits.div_(temperature)


def _add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """total += left @ right, without a temporary where the dtypes agree."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right
