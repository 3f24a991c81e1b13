"""Generation as the authors of RealSR-R1 do it: transformers' `generate` with Python logits processors per sample.

Written anew from the order and rules of their inference code, on the project's grammar: guidance, then the mask of what
may come next. Guidance is what costs most there: inside an image each sample has a second, unconditional context of its
own (the ids from the image start on, its own key/value cache), and one more forward pass per token, sample by sample.
Left out, which makes this side faster than theirs: the top-k that depends on the entropy, the tables that end at ten
samples (here 64 are one batch), and going on to the longest length after the end of the turn.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList

from actors.support_masks import SupportMasks
from vlcot.grammar import CHOICES, ChainState, Grammar, Support
from vlcot.policy.family import Family
from vlcot.policy.model import VlcotForCausalLM

GUIDANCE = 0.8
"""PURE's and the authors' ``cfg``."""
UNGUIDED_IDS = 3
"""Image start and the two grid sizes: guidance begins with the third id after the start."""


class PerSampleGuidance(LogitsProcessor):
    """``u + GUIDANCE * (c - u)`` inside images; ``u`` from one forward pass per sample and token."""

    def __init__(self, model: VlcotForCausalLM, grammar: Grammar, prompt_length: int, samples: int) -> None:
        self._model = model
        self._vocabulary = grammar.vocabulary
        self._prompt_length = prompt_length
        self._started: list[int | None] = [None] * samples
        self._caches: list[DynamicCache | None] = [None] * samples

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        for row in range(len(input_ids)):
            self._follow(row, input_ids)
            start = self._started[row]
            if start is None or input_ids.shape[1] - start < UNGUIDED_IDS:
                continue
            cache = self._caches[row]
            new = input_ids[row : row + 1, start:] if cache is None else input_ids[row : row + 1, -1:]
            output = self._model(input_ids=new, past_key_values=cache or DynamicCache(), use_cache=True)
            self._caches[row] = output.past_key_values
            unconditional = output.logits[0, -1].float()
            scores[row] = unconditional + GUIDANCE * (scores[row] - unconditional)
        return scores

    def _follow(self, row: int, input_ids: torch.Tensor) -> None:
        """Where the image began that the row is in, if it is in one."""
        if input_ids.shape[1] == self._prompt_length:
            return
        last = int(input_ids[row, -1])
        if last == self._vocabulary.image_start:
            self._started[row] = input_ids.shape[1] - 1
        elif last == self._vocabulary.image_end:
            self._started[row] = self._caches[row] = None


class PerSampleGrammar(LogitsProcessor):
    """The grammar's mask, row by row."""

    def __init__(self, grammar: Grammar, prompt_length: int, samples: int) -> None:
        self._prompt_length = prompt_length
        self._states = [ChainState(grammar) for _ in range(samples)]
        self._allowed = {kind: torch.from_numpy(grammar.support_ids(kind)) for kind in CHOICES}

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        masked = torch.full_like(scores, float("-inf"))
        for row, state in enumerate(advance(self._states, input_ids, self._prompt_length)):
            kind, forced = state.next()
            if kind is Support.FORCED:
                masked[row, forced] = 0.0
            else:
                allowed = self._allowed[kind]
                masked[row, allowed] = scores[row, allowed]
        return masked


class BatchedGrammar(LogitsProcessor):
    """The same mask for all rows at once, as the rollout actor applies it."""

    def __init__(self, grammar: Grammar, prompt_length: int, samples: int) -> None:
        self._prompt_length = prompt_length
        self._states = [ChainState(grammar) for _ in range(samples)]
        self._masks = SupportMasks(grammar)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return self._masks.apply(scores, advance(self._states, input_ids, self._prompt_length))


def advance(states: list[ChainState], input_ids: torch.Tensor, prompt_length: int) -> list[ChainState]:
    """The states after the newest id of each row."""
    if input_ids.shape[1] > prompt_length:
        for state, token in zip(states, input_ids[:, -1].tolist(), strict=True):
            state.advance(token)
    return states


@torch.no_grad()
def sample(
    model: VlcotForCausalLM,
    family: Family,
    prompts: Sequence[Sequence[int]],
    group_size: int,
    max_new_tokens: int,
    *,
    guided: bool,
    per_sample_grammar: bool = True,
) -> list[list[int]]:
    """The chains of ``prompts``, which have one length, ``group_size`` each, in one batch; temperature 1."""
    grammar = family.grammar
    ids = torch.tensor([list(map(int, prompt)) for prompt in prompts]).repeat_interleave(group_size, 0)
    rows, length = ids.shape
    masks = PerSampleGrammar if per_sample_grammar else BatchedGrammar
    processors: list[LogitsProcessor] = [PerSampleGuidance(model, grammar, length, rows)] if guided else []
    output = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=max_new_tokens,
        eos_token_id=family.vocabulary.turn_end,
        pad_token_id=family.vocabulary.pad,
        logits_processor=LogitsProcessorList([*processors, masks(grammar, length, rows)]),
    )
    return [_until_turn_end(row, family.vocabulary.turn_end) for row in output[:, length:].tolist()]


def _until_turn_end(ids: list[int], turn_end: int) -> list[int]:
    return ids[: ids.index(turn_end) + 1] if turn_end in ids else ids
