"""The clipped GRPO loss on packed tokens (paper, eq. 1) and its denominators."""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from vlcot.grpo.corrections import importance_ratio, truncated_importance_weights
from vlcot.grpo.kl import KL_ESTIMATORS, k3
from vlcot.grpo.stats import LossStats

KLEstimator = Literal["k1", "k2", "k3"]
Normalisation = Literal["sequence", "token", "dr_grpo"]


@dataclass(frozen=True)
class LossConfig:
    """Settings of `grpo_loss`; docs/grpo.md has the formulas.

    clip_low, clip_high: the ratio is clipped to [1 - clip_low, 1 + clip_high]. 0.2 as in PPO; the paper's number is not
        in the text we have. Clip-higher (DAPO) is clip_high = 0.28.
    kl_beta: weight of the KL to the reference, per token. 0.04 is DeepSeekMath's, where GRPO comes from; the paper's
        number is lost in the available text, and the authors' released code has no KL.
    kl: estimator, see `vlcot.grpo.kl`.
    kl_importance_weighted: multiply the estimator by pi / pi_old, gradient included, which makes its mean gradient that
        of KL(policy || reference) even on stale samples (DeepSeek-V3.2).
    normalisation: ``sequence`` mean over the tokens of each sequence, then over sequences (the paper); ``token`` mean
        over all loss tokens of the step (DAPO); ``dr_grpo`` sum over tokens / (sequences * max_tokens).
    max_tokens: the constant of ``dr_grpo``: the generation budget of one sequence, in tokens.
    dual_clip: for A < 0 the surrogate never falls below dual_clip * A (Ye et al. 2020 use 3); None is off.
    is_truncation: cap of the token-level weights min(pi_old / mu, cap) on the surrogate; None is off.
    """

    clip_low: float = 0.2
    clip_high: float = 0.2
    kl_beta: float = 0.04
    kl: KLEstimator = "k3"
    kl_importance_weighted: bool = False
    normalisation: Normalisation = "sequence"
    max_tokens: int | None = None
    dual_clip: float | None = None
    is_truncation: float | None = None

    def __post_init__(self) -> None:
        if not 0 < self.clip_low < 1 or not 0 < self.clip_high < float("inf"):
            raise ValueError(
                f"clip_low is {self.clip_low} and clip_high {self.clip_high}; allowed: 0 < clip_low < 1, 0 < clip_high"
            )
        if not 0 <= self.kl_beta < float("inf"):
            raise ValueError(f"kl_beta is {self.kl_beta}; it must be 0 (no KL in the loss) or positive")
        if self.kl not in KL_ESTIMATORS:
            raise ValueError(f"kl {self.kl!r} is unknown; allowed: {', '.join(KL_ESTIMATORS)}")
        if self.kl == "k1" and self.kl_beta > 0 and not self.kl_importance_weighted:
            raise ValueError(
                "kl 'k1' has zero mean gradient as a loss; use k3 or k2, or set kl_importance_weighted = true"
            )
        if self.normalisation not in get_args(Normalisation):
            allowed = ", ".join(get_args(Normalisation))
            raise ValueError(f"normalisation {self.normalisation!r} is unknown; allowed: {allowed}")
        if (self.normalisation == "dr_grpo") != (self.max_tokens is not None):
            raise ValueError(
                f"max_tokens is {self.max_tokens} with normalisation {self.normalisation!r}; dr_grpo needs it, "
                "the others have no use for it"
            )
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ValueError(f"max_tokens is {self.max_tokens}; it must be at least 1")
        if self.dual_clip is not None and not self.dual_clip > 1:
            raise ValueError(f"dual_clip is {self.dual_clip}; it must be above 1, or null to switch it off")
        if self.is_truncation is not None and not self.is_truncation >= 1:
            raise ValueError(f"is_truncation is {self.is_truncation}; it must be at least 1, or null to switch it off")


@dataclass(frozen=True)
class Denominators:
    """What one optimiser step is divided by: totals over all its micro-batches and ranks.

    sequences: kept sequences. tokens: loss tokens of kept sequences. ``a + b`` adds up micro-batches or ranks.
    """

    sequences: int
    tokens: int

    def __add__(self, other: "Denominators") -> "Denominators":
        return Denominators(self.sequences + other.sequences, self.tokens + other.tokens)


class LossOutput(NamedTuple):
    """loss: scalar float32 (or float64), attached to ``logprobs``; sums over micro-batches and ranks to the loss of the
    step. stats: mergeable statistics, see `vlcot.grpo.stats`."""

    loss: Tensor
    stats: LossStats


def packed_sequence_index(lengths: Tensor) -> Tensor:
    """Sequence of each token of a pack, int64 [T], from the lengths of the sequences, int64 [N].

    Lengths, never token values, decide where a sequence ends: an end-of-sequence id may equal the padding id, occur
    in the middle or be missing.
    """
    return torch.arange(lengths.numel(), device=lengths.device).repeat_interleave(lengths)


def count_denominators(keep: Tensor, token_mask: Tensor, sequence_index: Tensor) -> Denominators:
    """Denominators of these sequences alone; add those of the other micro-batches and ranks before using them.

    keep: bool [N]; token_mask: bool [T]; sequence_index: int64 [T].
    """
    return Denominators(int(keep.sum()), int((token_mask & keep[sequence_index]).sum()))


def grpo_loss(
    logprobs: Tensor,
    *,
    old_logprobs: Tensor,
    reference_logprobs: Tensor | None,
    advantages: Tensor,
    keep: Tensor,
    token_mask: Tensor,
    sequence_index: Tensor,
    config: LossConfig,
    denominators: Denominators,
    behaviour_logprobs: Tensor | None = None,
) -> LossOutput:
    """Loss of one micro-batch of whole sequences, packed into T tokens.

    logprobs: float [T], log pi of the sampled ids under the policy being trained, with gradient (nats).
    old_logprobs: float [T], the anchor of the ratio: log-probs of the sampler (default, asynchronous too), or of the
        learner's own weights at the start of the step if ``behaviour_logprobs`` is given as well.
    reference_logprobs: float [T] of the frozen reference, or None if ``kl_beta`` is 0.
    advantages: float32 [N], keep: bool [N], as from `group_advantages`. A sequence that is not kept adds nothing.
    token_mask: bool [T], True where a token was sampled: prompt, padding and forced tokens are False. What the
        log-probs hold there is never read.
    sequence_index: int64 [T], the sequence in 0..N-1 that each token belongs to, in any order.
    denominators: of the whole optimiser step. With them the micro-batches' gradients SUM to the gradient of the step;
        an engine that averages over R ranks and divides by K accumulation steps needs ``loss * R * K``.
    behaviour_logprobs: float [T] of the sampler, needed by ``is_truncation``; None means ``old_logprobs``.

    A micro-batch without any loss token gives a loss of 0 that can be differentiated, so that every rank can take part
    in collective backward passes. Raises ValueError for shapes that do not fit, denominators smaller than this
    micro-batch, and log-probs or advantages that are not finite where they count.
    """
    _check_inputs(
        config,
        denominators,
        keep,
        token_mask,
        sequence_index,
        advantages,
        logprobs=logprobs,
        old_logprobs=old_logprobs,
        reference_logprobs=reference_logprobs,
        behaviour_logprobs=behaviour_logprobs,
    )
    selected = token_mask & keep[sequence_index]
    policy = _at_loss_positions(logprobs, selected)
    old = _at_loss_positions(old_logprobs.detach(), selected)
    behaviour = old if behaviour_logprobs is None else _at_loss_positions(behaviour_logprobs.detach(), selected)

    ratio = importance_ratio(policy, old)
    advantage = torch.where(selected, advantages[sequence_index], 0.0)
    surrogate, clipped = _clipped_surrogate(ratio, advantage, config)
    weight = torch.ones_like(old)
    if config.is_truncation is not None:
        weight = truncated_importance_weights(old, behaviour, config.is_truncation)
    token_loss = -weight * surrogate

    kl = None
    if reference_logprobs is not None:
        kl = KL_ESTIMATORS[config.kl](policy, _at_loss_positions(reference_logprobs.detach(), selected))
        if config.kl_importance_weighted:
            kl = ratio * kl
        # Per token, before any mean: the KL is normalised exactly like the surrogate.
        if config.kl_beta > 0:
            token_loss = token_loss + config.kl_beta * kl

    share = _token_shares(selected, sequence_index, keep.numel(), config, denominators).to(token_loss.dtype)
    loss = (share * token_loss).sum()

    with torch.no_grad():
        tokens = selected.sum()
        nothing = torch.zeros_like(tokens)
        cap = math.inf if config.is_truncation is None else config.is_truncation
        stats = LossStats.of(
            sums={
                "loss": loss,
                "tokens": tokens,
                "kl_tokens": nothing if kl is None else tokens,
                "kl": nothing if kl is None else kl.double().sum(),
                "clipped": clipped.sum(),
                "ratio": (ratio.double() * selected).sum(),
                "log_ratio": (policy - old).double().sum(),
                "sampler_kl": k3(behaviour, policy).double().sum(),
                "is_weight": (weight.double() * selected).sum(),
                "is_truncated": (old - behaviour > math.log(cap)).sum(),
            },
            maxima={
                "log_ratio_abs": _largest(policy - old),
                "sampler_log_ratio_abs": _largest(policy - behaviour),
            },
        )
    return LossOutput(loss, stats)


def _clipped_surrogate(ratio: Tensor, advantage: Tensor, config: LossConfig) -> tuple[Tensor, Tensor]:
    """``min(ratio * A, clip(ratio) * A)`` per token, and where the clip removed its gradient."""
    plain = ratio * advantage
    surrogate = torch.minimum(plain, ratio.clamp(1 - config.clip_low, 1 + config.clip_high) * advantage)
    clipped = ((advantage > 0) & (ratio > 1 + config.clip_high)) | ((advantage < 0) & (ratio < 1 - config.clip_low))
    if config.dual_clip is not None:
        floor = config.dual_clip * advantage
        surrogate = torch.where(advantage < 0, torch.maximum(surrogate, floor), surrogate)
        clipped = clipped | ((advantage < 0) & (ratio > config.dual_clip))
    return surrogate, clipped


def _token_shares(
    selected: Tensor, sequence_index: Tensor, sequences: int, config: LossConfig, denominators: Denominators
) -> Tensor:
    """Weight of each token in the loss of the step, float64 [T]; 0 outside loss positions."""
    if config.normalisation == "token":
        return selected.double() / denominators.tokens
    if config.normalisation == "dr_grpo":
        assert config.max_tokens is not None  # LossConfig holds this
        return selected.double() / (denominators.sequences * config.max_tokens)
    lengths = torch.zeros(sequences, dtype=torch.int64, device=selected.device)
    lengths = lengths.index_add(0, sequence_index, selected.long())
    return selected.double() / (lengths.clamp(min=1)[sequence_index] * denominators.sequences)


def _at_loss_positions(values: Tensor, selected: Tensor) -> Tensor:
    """At least float32, with zeros where nothing may be read: neither a value nor a gradient passes there."""
    return torch.where(selected, values, 0.0).to(torch.promote_types(values.dtype, torch.float32))


def _largest(values: Tensor) -> Tensor:
    return values.abs().max() if values.numel() else values.new_zeros(())


def _check_inputs(
    config: LossConfig,
    denominators: Denominators,
    keep: Tensor,
    token_mask: Tensor,
    sequence_index: Tensor,
    advantages: Tensor,
    **logprobs: Tensor | None,
) -> None:
    if config.kl_beta > 0 and logprobs["reference_logprobs"] is None:
        raise ValueError(f"kl_beta is {config.kl_beta} but reference_logprobs is None; give them, or set kl_beta = 0")
    if config.is_truncation is not None and logprobs["behaviour_logprobs"] is None:
        raise ValueError("is_truncation needs behaviour_logprobs, the sampler's log-probs, beside old_logprobs")

    tokens, sequences = token_mask.numel(), keep.numel()
    shapes: dict[str, tuple[Tensor, int]] = {
        "token_mask": (token_mask, tokens),
        "sequence_index": (sequence_index, tokens),
        "keep": (keep, sequences),
        "advantages": (advantages, sequences),
    }
    shapes |= {name: (values, tokens) for name, values in logprobs.items() if values is not None}
    for name, (values, size) in shapes.items():
        if values.shape != (size,):
            raise ValueError(f"{name} has shape {list(values.shape)}; it must be [{size}]")
    for name, mask in (("token_mask", token_mask), ("keep", keep)):
        if mask.dtype != torch.bool:
            raise ValueError(f"{name} is {mask.dtype}; it must be torch.bool")
    if tokens and (int(sequence_index.min()) < 0 or int(sequence_index.max()) >= sequences):
        raise ValueError(f"sequence_index must lie in 0..{sequences - 1}, the rows of advantages and keep")

    local = count_denominators(keep, token_mask, sequence_index)
    if min(denominators.sequences, denominators.tokens) < 1:
        raise ValueError(f"{denominators}: skip a step in which every group was dropped")
    if denominators.sequences < local.sequences or denominators.tokens < local.tokens:
        raise ValueError(
            f"{denominators} are below this micro-batch's own {local}; they must be those of the whole step"
        )

    if (keep & ~advantages.isfinite()).any():
        raise ValueError("advantages of kept sequences are not finite")
    selected = token_mask & keep[sequence_index]
    broken = {
        name: int((selected & ~values.isfinite()).sum()) for name, values in logprobs.items() if values is not None
    }
    if any(broken.values()):
        raise ValueError(
            f"log-probs that are not finite at loss positions, of {local.tokens}: {broken}. -inf means that a sampled "
            "id is outside the support the learner allows; NaN that a forward pass broke"
        )
