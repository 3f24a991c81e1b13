"""The grammar as a vLLM (V1) logits processor."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, MoveDirectionality

from actors.decoding import Decoding, EntropyTopK, truncate
from actors.support_masks import SupportMasks
from vlcot.grammar import ChainState, Grammar
from vlcot.policy.family import Family

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.config import VllmConfig


class Chain:
    """The chain of one request: vLLM's live list of its output ids, and how far the grammar has read it.

    ``decoding`` holds its top-k, None where all ids of a support stay.
    """

    __slots__ = ("_grammar", "_state", "_taken", "_tokens", "decoding")

    def __init__(self, grammar: Grammar, tokens: list[int], decoding: Decoding | None = None) -> None:
        self._grammar = grammar
        self.decoding = decoding
        self._tokens = tokens
        self._restart()

    def _restart(self) -> None:
        self._state = ChainState(self._grammar)
        self._taken = 0

    def state(self) -> ChainState:
        """The state after all ids written so far; O(1) per new id, a shortened list is read again.

        Raises:
            RuntimeError: vLLM left a placeholder (-1) in the list: the id is not known yet.
        """
        if len(self._tokens) < self._taken:
            self._restart()
        for token in self._tokens[self._taken :] if self._taken < len(self._tokens) else ():
            if token < 0:
                raise RuntimeError("vLLM asks for the next id before the last one is known")
            self._state.advance(token)
            self._taken += 1
        return self._state


class GrammarProcessor(LogitsProcessor):
    """Masks every request to the ids that its chain's grammar allows next, and cuts those that ask for it to a top-k.

    The family (vocabulary and layout) is read from the model directory. All requests of the engine are
    chains; there is no way to switch the grammar off, since the learner always applies it too. Top-k is a matter of
    single requests (:meth:`actors.decoding.Decoding.extra_args`), and not of those that are trained on.
    """

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        self._grammar = Family.from_pretrained(vllm_config.model_config.model).grammar
        self._masks = SupportMasks(self._grammar, device)
        self._chains: dict[int, Chain] = {}

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Refuse what the learner's log-probs do not model: greedy decoding, vLLM's own truncation, penalties.

        Raises:
            ValueError: naming the parameter.
        """
        p = sampling_params
        Decoding.from_extra_args(p.extra_args)
        wrong = {
            "temperature": p.temperature <= 0,
            "top_p": p.top_p != 1.0,
            "top_k": p.top_k > 0,
            "min_p": p.min_p != 0.0,
            "presence_penalty": p.presence_penalty != 0.0,
            "frequency_penalty": p.frequency_penalty != 0.0,
            "repetition_penalty": p.repetition_penalty != 1.0,
            "logit_bias": bool(p.logit_bias),
            "min_tokens": p.min_tokens > 0,
        }
        if names := [name for name, is_wrong in wrong.items() if is_wrong]:
            raise ValueError(f"{', '.join(names)}: a chain is sampled at a positive temperature and nothing else")

    def is_argmax_invariant(self) -> bool:
        """The mask changes the arg max."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follow requests through the batch: removed, then added, then moved (vLLM's order)."""
        if batch_update is None:
            return
        chains = self._chains
        for index in batch_update.removed:
            chains.pop(index, None)
        for index, params, _, output_ids in batch_update.added:
            chains[index] = Chain(self._grammar, output_ids, Decoding.from_extra_args(params.extra_args))
        for source, target, direction in batch_update.moved:
            moved, displaced = chains.pop(source, None), chains.pop(target, None)
            if moved is not None:
                chains[target] = moved
            if displaced is not None and direction is MoveDirectionality.SWAP:
                chains[source] = displaced

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Mask ``logits`` [requests, vocabulary] in place."""
        chains = [self._chains[row] for row in range(logits.shape[0])]
        masked = self._masks.apply(logits, [chain.state() for chain in chains])
        rows_by_top_k: dict[EntropyTopK, list[int]] = {}
        for row, chain in enumerate(chains):
            if chain.decoding is not None and (top_k := chain.decoding.top_k(chain.state().next()[0])) is not None:
                rows_by_top_k.setdefault(top_k, []).append(row)
        for top_k, rows in rows_by_top_k.items():
            masked[rows] = truncate(masked[rows], top_k)
        return masked
