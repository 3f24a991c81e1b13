"""Chains under way in one batch, each with its row of keys and values and, if it is guided, the row of its twin."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from transformers import DynamicCache

from actors.decoding import Decoding, guided, truncate
from vlcot.grammar import CHOICES, ChainState, Grammar, Support
from vlcot.policy.logprobs import SupportTable, support_logits
from vlcot.policy.model import VlcotForCausalLM
from vlcot.policy.row_cache import NextIds, RowCache

KEPT_SHARE = 0.75
"""The caches are copied without the ended chains as soon as no larger share of their rows is under way."""


class Row:
    """One chain.

    Args:
        seed: of its own random numbers.
        most: ids it may have.

    Attributes:
        ids, logprobs: written so far; log-probs under the distribution that the id was drawn from, 0 where forced.
        place, twin: its rows in the two caches; ``twin`` is -1 where it is not guided.
        at, twin_at: where the newest hidden states of both stand in :attr:`PairedRows.hidden`; ``twin_at`` is -1
            outside of images.
    """

    def __init__(self, grammar: Grammar, decoding: Decoding, seed: int, most: int) -> None:
        self.decoding = decoding
        self.state = ChainState(grammar)
        self.ids: list[int] = []
        self.logprobs: list[float] = []
        self.place = self.twin = self.at = self.twin_at = -1
        # Below 1 by more than a rounding, so that times the sum of all probabilities it is below that sum.
        self._noise = np.random.default_rng(seed).random(most) * (1 - 1e-12)

    @property
    def noise(self) -> float:
        """Uniform in [0, 1): the random number of the next id."""
        return float(self._noise[len(self.ids)])

    @property
    def is_in_image(self) -> bool:
        """Whether the newest id belongs to an image that goes on."""
        return not self.state.finished and self.state.next()[0] in (Support.FORCED, Support.CODE)

    def take(self, token: int, logprob: float) -> None:
        """Write one id."""
        self.ids.append(token)
        self.logprobs.append(logprob)
        self.state.advance(token)


class Choice:
    """Chooses the next id of rows, over the ids that the grammar allows and no others."""

    def __init__(self, model: VlcotForCausalLM, grammar: Grammar) -> None:
        self._head = model.lm_head.weight
        self._slices = SupportTable.of(grammar).slices
        self._ids = {support: torch.from_numpy(grammar.support_ids(support)) for support in CHOICES}

    def make(self, rows: Sequence[Row], hidden: torch.Tensor) -> None:
        """Give each row its next id, from ``hidden`` [N, d] at the row's places."""
        alike: dict[tuple[Support, Decoding], list[Row]] = {}
        for row in rows:
            support, forced = row.state.next()
            if support is Support.FORCED:
                row.take(forced, 0.0)
            else:
                alike.setdefault((support, row.decoding), []).append(row)
        for (support, decoding), own in alike.items():
            logprobs = self._logprobs(own, hidden, support, decoding)
            chosen = draw(logprobs, [row.noise for row in own])
            values = logprobs.gather(1, chosen[:, None]).squeeze(1).tolist()
            for row, token, value in zip(own, self._ids[support][chosen.cpu()].tolist(), values, strict=True):
                row.take(token, value)

    def _logprobs(self, rows: list[Row], hidden: torch.Tensor, support: Support, decoding: Decoding) -> torch.Tensor:
        """float32 [rows, allowed]."""
        slices = self._slices[support]
        logits = support_logits(hidden[[row.at for row in rows]], self._head, slices, 1.0)
        if support is Support.CODE and decoding.is_guided:
            unconditional = support_logits(hidden[[row.twin_at for row in rows]], self._head, slices, 1.0)
            logits = guided(logits, unconditional, decoding.guidance)
        return truncate(logits, decoding.top_k(support)).div_(decoding.temperature).log_softmax(-1)


def draw(logprobs: torch.Tensor, noise: Sequence[float]) -> torch.Tensor:
    """int64 [N]: a column for each row of ``logprobs`` [N, V], by the inverse of its distribution function at
    ``noise``, N numbers in [0, 1)."""
    below = logprobs.double().exp_().cumsum(-1)
    target = torch.tensor(noise, dtype=torch.float64, device=logprobs.device)[:, None] * below[:, -1:]
    return torch.searchsorted(below, target, right=True).squeeze(1)


class PairedRows:
    """The rows of one batch and their caches.

    Args:
        prompts: int ids of each prompt; the rows of a prompt stand together, ``group_size`` for each.
        most: ids that a chain may have.

    Attributes:
        live: the rows that have not ended.
        hidden: final hidden states [N, d] of the newest ids.
    """

    def __init__(
        self,
        model: VlcotForCausalLM,
        grammar: Grammar,
        rows: Sequence[Row],
        prompts: Sequence[np.ndarray],
        group_size: int,
        most: int,
    ) -> None:
        self._model = model
        self._image_start = grammar.vocabulary.image_start
        self.live = list(rows)
        pairs = [row for row in rows if row.decoding.is_guided]
        config, head = model.config, model.lm_head.weight
        self._own = RowCache(config, len(rows), max(map(len, prompts)) + most, head)
        self._twins = RowCache(config, len(pairs), max(map(len, grammar.blocks), default=0) + 1, head)
        for place, row in enumerate(rows):
            row.place = row.at = place
        for place, row in enumerate(pairs):
            row.twin = place
        states = [self._prefill(ids, i * group_size, group_size) for i, ids in enumerate(prompts)]
        self.hidden = torch.cat(states)

    def _prefill(self, ids: np.ndarray, first: int, count: int) -> torch.Tensor:
        read = DynamicCache()
        following = torch.from_numpy(ids).long().to(self._model.device)[None]
        hidden = self._model.model(input_ids=following, past_key_values=read).last_hidden_state[:, -1]
        keys, values = ([getattr(layer, name) for layer in read.layers] for name in ("keys", "values"))
        self._own.fill(slice(first, first + count), keys, values)
        return hidden.expand(count, -1)

    def read(self) -> None:
        """Drop the rows that have ended; one forward pass over the newest id of the others, of which there must be
        some, and of their twins."""
        self.live = [row for row in self.live if not row.state.finished]
        self._compact()
        pairs = [row for row in self.live if row.twin >= 0 and row.is_in_image]
        self._twins.restart([row.twin for row in pairs if row.ids[-1] == self._image_start])
        where = NextIds([(self._own, [row.place for row in self.live]), (self._twins, [row.twin for row in pairs])])
        ids = torch.tensor([row.ids[-1] for row in (*self.live, *pairs)], device=self._model.device)
        self.hidden = self._model.next_hidden(ids, where)
        for at, row in enumerate(self.live):
            row.at, row.twin_at = at, -1
        for at, row in enumerate(pairs, len(self.live)):
            row.twin_at = at

    def _compact(self) -> None:
        if len(self.live) > KEPT_SHARE * len(self._own.lengths):
            return
        self._own.keep([row.place for row in self.live])
        pairs = [row for row in self.live if row.twin >= 0]
        self._twins.keep([row.twin for row in pairs])
        for place, row in enumerate(self.live):
            row.place = place
        for place, row in enumerate(pairs):
            row.twin = place
