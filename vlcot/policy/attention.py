"""Attention of several chains that share one prompt, without computing or copying the prompt once per chain.

Packed order of all tokens: the prompts one after another, then the chains one after another. A chain's tokens see their
whole prompt and, causally, their own chain.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

Heads = torch.Tensor
"""[rows, heads, tokens, head_dim]"""


@dataclass(frozen=True)
class SharedPrompts:
    """Shape of a packed batch.

    Attributes:
        counts: chains of each prompt (at least 1), in the order of the chains.
        prompt_tokens: of every prompt (P).
        chain_tokens: of every chain, padding at the end included (S).
    """

    counts: tuple[int, ...]
    prompt_tokens: int
    chain_tokens: int

    def split(self, packed: torch.Tensor) -> tuple[Heads, Heads]:
        """[1, heads, tokens, head_dim] to [prompts, heads, P, head_dim] and [chains, heads, S, head_dim]."""
        _, heads, _, dim = packed.shape
        of_prompts = len(self.counts) * self.prompt_tokens
        prompts = packed[0, :, :of_prompts].reshape(heads, len(self.counts), self.prompt_tokens, dim)
        chains = packed[0, :, of_prompts:].reshape(heads, sum(self.counts), self.chain_tokens, dim)
        return prompts.transpose(0, 1), chains.transpose(0, 1)

    def join(self, prompts: Heads, chains: Heads) -> torch.Tensor:
        """The reverse of :meth:`split`."""
        return torch.cat([part.transpose(0, 1).flatten(1, 2) for part in (prompts, chains)], 1)[None]

    def chains_of(self, chains: Heads) -> Iterator[Heads]:
        """The chains of each prompt as one long row: [1, heads, count * S, head_dim] ([1, heads, count * S] too)."""
        for rows in chains.split(self.counts):
            yield rows.transpose(0, 1).flatten(1, 2)[None]


def shared_prompt_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, batch: SharedPrompts, scale: float
) -> torch.Tensor:
    """Softmax attention of a packed batch; all tensors [1, heads, tokens, head_dim], as is the result.

    On CUDA the prompt's keys are joined to those of each chain, for which flash attention has a causal mask aligned to
    the end. The CPU kernel has none and would compute the masked half, so there each chain attends in two parts that
    are merged by their log-sum-exps; nothing is copied.
    """
    (prompt_q, chain_q), (prompt_k, chain_k), (prompt_v, chain_v) = map(batch.split, (query, key, value))
    prompts = scaled_dot_product_attention(prompt_q, prompt_k, prompt_v, is_causal=True, scale=scale)
    attend = joined_keys if query.is_cuda else merged_parts
    chains = attend(chain_q, chain_k, chain_v, prompt_k, prompt_v, batch, scale)
    return batch.join(prompts, chains)


def joined_keys(
    query: Heads, key: Heads, value: Heads, prompt_key: Heads, prompt_value: Heads, batch: SharedPrompts, scale: float
) -> Heads:
    """The chains' part of :func:`shared_prompt_attention`, with the prompt's keys repeated for each chain."""
    counts = torch.tensor(batch.counts, device=query.device)
    keys, values = (
        torch.cat([shared.repeat_interleave(counts, 0, output_size=len(own)), own], 2)
        for shared, own in ((prompt_key, key), (prompt_value, value))
    )
    return scaled_dot_product_attention(
        query, keys, values, attn_mask=causal_lower_right(query.shape[2], keys.shape[2]), scale=scale
    )


def merged_parts(
    query: Heads, key: Heads, value: Heads, prompt_key: Heads, prompt_value: Heads, batch: SharedPrompts, scale: float
) -> Heads:
    """The same with torch's CPU kernel, which gives the log-sum-exp of each part."""
    return _MergedParts.apply(query, key, value, prompt_key, prompt_value, batch, scale)


class _MergedParts(torch.autograd.Function):
    """Softmax over two sets of keys: each part's result, weighted with its share of the whole log-sum-exp.

    With the merged result and log-sum-exp, the kernel's backward gives each part's exact gradient (as in ring
    attention, arXiv 2310.01889).
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Heads,
        key: Heads,
        value: Heads,
        prompt_key: Heads,
        prompt_value: Heads,
        batch: SharedPrompts,
        scale: float,
    ) -> Heads:
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out, lse = flash(query, key, value, 0.0, True, scale=scale)
        parts = [
            flash(rows, prompt_key[i : i + 1], prompt_value[i : i + 1], 0.0, False, scale=scale)
            for i, rows in enumerate(batch.chains_of(query))
        ]
        prompt_out, prompt_lse = (_apart(list(pieces), batch) for pieces in zip(*parts, strict=True))
        merged_lse = torch.logaddexp(lse, prompt_lse)
        merged = _weighted(out, lse - merged_lse) + _weighted(prompt_out, prompt_lse - merged_lse)
        ctx.save_for_backward(query, key, value, prompt_key, prompt_value, merged, merged_lse)
        ctx.batch, ctx.scale = batch, scale
        return merged

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        query, key, value, prompt_key, prompt_value, out, lse = ctx.saved_tensors
        gradient = upstream[0].contiguous()
        of_query, of_key, of_value = flash(gradient, query, key, value, out, lse, 0.0, True, scale=ctx.scale)
        rows = zip(*(ctx.batch.chains_of(x) for x in (gradient, query, out, lse)), strict=True)
        parts = [
            flash(g, q, prompt_key[i : i + 1], prompt_value[i : i + 1], o, s, 0.0, False, scale=ctx.scale)
            for i, (g, q, o, s) in enumerate(rows)
        ]
        queries, keys, values = (list(pieces) for pieces in zip(*parts, strict=True))
        of_query += _apart(queries, ctx.batch)
        return of_query, of_key, of_value, torch.cat(keys), torch.cat(values), None, None


def _apart(rows: list[torch.Tensor], batch: SharedPrompts) -> torch.Tensor:
    """The reverse of :meth:`SharedPrompts.chains_of`: [chains, heads, S, ...]."""
    pieces = [row[0].unflatten(1, (count, batch.chain_tokens)) for row, count in zip(rows, batch.counts, strict=True)]
    return torch.cat(pieces, 1).transpose(0, 1)


def _weighted(out: Heads, log_share: torch.Tensor) -> Heads:
    return out * log_share.exp()[..., None].to(out.dtype)
