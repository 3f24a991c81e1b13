"""The grammar as masks over logits, for both samplers."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vlcot.grammar import CHOICES, ChainState, Grammar, Support


class SupportMasks:
    """Masks the logits of a batch of chains to what the grammar allows next.

    One boolean row per support is kept, so a batch costs one gather and one fill whatever its chains do.
    """

    def __init__(self, grammar: Grammar, device: torch.device | str = "cpu") -> None:
        forbidden = torch.ones(len(Support), grammar.vocabulary.size, dtype=torch.bool)
        for support in CHOICES:
            forbidden[support, torch.from_numpy(grammar.support_ids(support))] = False
        self._forbidden = forbidden.to(device)

    def apply(self, logits: torch.Tensor, states: Sequence[ChainState]) -> torch.Tensor:
        """Set the logits that ``states`` forbid to -inf, in place.

        Args:
            logits: float [N, vocabulary].
            states: N chain states, row by row.

        Raises:
            ValueError: another number of states than rows, or of columns than ids.
        """
        if logits.shape != (len(states), self._forbidden.shape[1]):
            raise ValueError(f"logits {tuple(logits.shape)} do not fit {len(states)} chains of this vocabulary")
        following = [state.next() for state in states]
        kinds = torch.tensor([kind for kind, _ in following], device=logits.device)
        logits.masked_fill_(self._forbidden[kinds], float("-inf"))
        forced = [(row, token) for row, (kind, token) in enumerate(following) if kind is Support.FORCED]
        if forced:
            rows, tokens = torch.tensor(forced, device=logits.device).T
            logits[rows, tokens] = 0.0
        return logits
