"""The policy for training and reference sampling (transformers).

Parameter names are those of Chameleon checkpoints: ``model.layers.N.self_attn.{q,k}_norm.{weight,bias}``
beside Llama's. The head can give token log-probs without ever holding logits of the whole vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM
from transformers.models.llama import modeling_llama as llama

from vlcot.policy.attention import SharedPrompts, shared_prompt_attention
from vlcot.policy.config import VlcotConfig
from vlcot.policy.logprobs import SupportTable, support_scores
from vlcot.policy.row_cache import NextIds

QK_NORM_EPS = 1e-5


class HeadNorm(nn.Module):
    """LayerNorm over ``head_dim`` with an affine transform per head. Input [..., heads, head_dim]."""

    def __init__(self, heads: int, head_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(heads, head_dim))
        self.bias = nn.Parameter(torch.zeros(heads, head_dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normal = nn.functional.layer_norm(x, (x.shape[-1],), None, None, QK_NORM_EPS)
        return normal * self.weight + self.bias


class VlcotAttention(llama.LlamaAttention):
    """Llama attention with :class:`HeadNorm` on queries and keys before the rotary embedding."""

    def __init__(self, config: VlcotConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.q_norm = HeadNorm(config.num_attention_heads, self.head_dim)
        self.k_norm = HeadNorm(config.num_key_value_heads, self.head_dim)

    def forward(  # type: ignore[override]
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: Any = None,
        shared_prompts: SharedPrompts | None = None,
        next_ids: NextIds | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Llama's attention on normalised queries and keys; hidden states [B, L, d], or packed [1, L, d]."""
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query = self.q_norm(self.q_proj(hidden_states).view(shape)).transpose(1, 2)
        key = self.k_norm(self.k_proj(hidden_states).view(shape)).transpose(1, 2)
        value = self.v_proj(hidden_states).view(shape).transpose(1, 2)
        query, key = llama.apply_rotary_pos_emb(query, key, *position_embeddings)
        if shared_prompts is not None:
            key, value = (llama.repeat_kv(x, self.num_key_value_groups) for x in (key, value))
            shared = shared_prompt_attention(query, key, value, shared_prompts, self.scaling)
            return self.o_proj(shared.transpose(1, 2).flatten(2)), None
        if next_ids is not None:
            output = next_ids.attend(self.layer_idx, query, key, value, self.scaling)
            return self.o_proj(output.transpose(1, 2).flatten(2)), None
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend = llama.ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, llama.eager_attention_forward
        )
        output, weights = attend(self, query, key, value, attention_mask, dropout=0.0, scaling=self.scaling, **kwargs)
        return self.o_proj(output.reshape(*hidden_states.shape[:-1], -1)), weights


class SupportHead(nn.Linear):
    """The language-model head. Called with a :class:`SupportTable` it gives log-probs of given ids only.

    A module of its own so that ZeRO-3 gathers its weight around forward and backward.
    """

    def forward(  # type: ignore[override]
        self,
        hidden: torch.Tensor,
        table: SupportTable | None = None,
        ids: torch.Tensor | None = None,
        supports: torch.Tensor | None = None,
        temperature: float = 1.0,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Logits [..., vocabulary]; with a table, what :func:`support_scores` gives."""
        if table is None or ids is None or supports is None:
            return super().forward(hidden)
        return support_scores(hidden, self.weight, table, ids, supports, temperature)


class VlcotForCausalLM(LlamaForCausalLM):
    """The policy."""

    config_class = VlcotConfig

    def __init__(self, config: VlcotConfig) -> None:
        super().__init__(config)
        for index, layer in enumerate(self.model.layers):
            layer.self_attn = VlcotAttention(config, index)
        self.lm_head = SupportHead(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def token_logprobs(
        self,
        input_ids: torch.Tensor,
        table: SupportTable,
        supports: torch.Tensor,
        temperature: float = 1.0,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Log-prob of each id given what stands before it, under the sampling distribution.

        Args:
            input_ids: int64 [B, L], right-padded.
            supports: uint8 [B, L], support of each position; FORCED (also prompt and padding) gives 0.
            temperature: of the sampling distribution.
            attention_mask: [B, L]; not needed with right padding.

        Returns:
            float32 [B, L]; position 0 is 0.
        """
        hidden = self.model(input_ids=input_ids[:, :-1], attention_mask=attention_mask).last_hidden_state
        flat, _ = self.lm_head(
            hidden.reshape(-1, hidden.shape[-1]),
            table,
            input_ids[:, 1:].reshape(-1),
            supports[:, 1:].reshape(-1),
            temperature,
        )
        return nn.functional.pad(flat.view(hidden.shape[:2]), (1, 0))

    def chain_logprobs(
        self,
        prompt_ids: torch.Tensor,
        chain_ids: torch.Tensor,
        supports: torch.Tensor,
        counts: tuple[int, ...],
        table: SupportTable,
        temperature: float = 1.0,
    ) -> torch.Tensor:
        """:meth:`token_logprobs` of chains, each prompt computed once for all of its chains; float32 [B, S]."""
        return self.chain_scores(prompt_ids, chain_ids, supports, counts, table, temperature)[0]

    def chain_scores(
        self,
        prompt_ids: torch.Tensor,
        chain_ids: torch.Tensor,
        supports: torch.Tensor,
        counts: tuple[int, ...],
        table: SupportTable,
        temperature: float = 1.0,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probs of chains, and the log-sum-exp of the logits at each of their positions.

        Args:
            prompt_ids: int64 [N, P].
            chain_ids: int64 [B, S], right-padded.
            supports: uint8 [B, S]; FORCED (also padding) gives 0.
            counts: chains of each prompt, in the order of the chains; they sum to B.
            table: of the grammar.
            temperature: of the sampling distribution.

        Returns:
            Two float32 [B, S], 0 at FORCED positions.
        """
        (prompts, length), (chains, width) = prompt_ids.shape, chain_ids.shape
        batch = SharedPrompts(counts, length, width)
        positions = torch.arange(length + width, device=chain_ids.device)
        positions = torch.cat([positions[:length].repeat(prompts), positions[length:].repeat(chains)])[None]
        hidden = self.model.embed_tokens(torch.cat([prompt_ids.flatten(), chain_ids.flatten()])[None])
        rotary = self.model.rotary_emb(hidden, position_ids=positions)
        for layer in self.model.layers:
            hidden = layer(hidden, position_embeddings=rotary, shared_prompts=batch)
        hidden = self.model.norm(hidden)[0]
        of_prompts, of_chains = hidden.split([prompts * length, chains * width])
        last = of_prompts.view(prompts, length, -1)[:, -1]
        first = torch.cat([row.expand(count, -1) for row, count in zip(last.split(1), counts, strict=True)])
        before = torch.cat([first[:, None], of_chains.view(chains, width, -1)[:, :-1]], 1)
        logprobs, logsumexp = self.lm_head(
            before.flatten(0, 1), table, chain_ids.flatten(), supports.flatten(), temperature
        )
        return logprobs.view(chains, width), logsumexp.view(chains, width)

    def next_hidden(self, ids: torch.Tensor, where: NextIds) -> torch.Tensor:
        """Final hidden states [N, d] of ``ids``, int64 [N], one for each row that ``where`` names, in its order."""
        hidden = self.model.embed_tokens(ids[None])
        rotary = self.model.rotary_emb(hidden, position_ids=where.positions[None])
        for layer in self.model.layers:
            hidden = layer(hidden, position_embeddings=rotary, next_ids=where)
        return self.model.norm(hidden)[0]


AutoModelForCausalLM.register(VlcotConfig, VlcotForCausalLM, exist_ok=True)
