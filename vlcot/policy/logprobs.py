"""Log-probs over the ids that the grammar allows, in chunks that backward recomputes.

An image position has 16,384 choices, not 73,728; text has no image ids. Only the allowed rows of the
head are multiplied, and only one chunk's logits exist at a time, so no [tokens, vocabulary] tensor ever does.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.checkpoint import checkpoint

from vlcot.grammar import Grammar, Support

CHUNK_TOKENS = 1024


@dataclass(frozen=True, eq=False)
class SupportTable:
    """The ids of each support as tensors on one device.

    Attributes:
        rows: support -> int64 [n] ids, sorted.
        index: support -> int64 [vocabulary], place of an id in ``rows``, -1 where it is not allowed.
    """

    rows: dict[Support, torch.Tensor]
    index: dict[Support, torch.Tensor]

    @classmethod
    def of(cls, grammar: Grammar, device: torch.device | str = "cpu") -> SupportTable:
        """The table of ``grammar``'s choices."""
        rows, index = {}, {}
        for support in (Support.CODE, Support.TEXT, Support.LAST_TEXT):
            ids = grammar.support_ids(support)
            place = np.full(grammar.vocabulary.size, -1, dtype=np.int64)
            place[ids] = np.arange(len(ids))
            rows[support] = torch.from_numpy(ids).to(device)
            index[support] = torch.from_numpy(place).to(device)
        return cls(rows, index)


def support_logprobs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    table: SupportTable,
    ids: torch.Tensor,
    supports: torch.Tensor,
    temperature: float,
) -> torch.Tensor:
    """log softmax(hidden @ weight[allowed].T / temperature) at ``ids``.

    Args:
        hidden: [T, d], any float dtype.
        weight: [vocabulary, d] rows of the head.
        ids: int64 [T]; must be allowed by their support.
        supports: uint8 [T] of :class:`Support`.
        temperature: positive.

    Returns:
        float32 [T], 0 at FORCED positions.

    Raises:
        ValueError: an id is outside its support, or the temperature is not positive.
    """
    if temperature <= 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    out = torch.zeros(ids.shape, dtype=torch.float32, device=hidden.device)
    for support, rows in table.rows.items():
        positions = (supports == int(support)).nonzero().squeeze(1)
        if positions.numel() == 0:
            continue
        targets = table.index[support][ids[positions]]
        if bool((targets < 0).any()):
            bad = int(ids[positions][targets < 0][0])
            raise ValueError(f"id {bad} is outside of support {support.name}")
        head = weight[rows]
        parts = [
            checkpoint(_chunk_logprobs, hidden[p], head, t, temperature, use_reentrant=False)
            for p, t in zip(positions.split(CHUNK_TOKENS), targets.split(CHUNK_TOKENS), strict=True)
        ]
        out = out.index_put((positions,), torch.cat(parts))
    return out


def _chunk_logprobs(
    hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor, temperature: float
) -> torch.Tensor:
    logits = (hidden @ head.T).float() / temperature
    return logits.gather(1, targets[:, None]).squeeze(1) - logits.logsumexp(1)
