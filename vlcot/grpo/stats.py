"""Statistics of the loss that add up over micro-batches and ranks."""

from dataclasses import dataclass

import torch
from torch import Tensor

SUMS = (
    "loss",
    "tokens",
    "kl_tokens",
    "kl",
    "clipped",
    "ratio",
    "log_ratio",
    "sampler_kl",
    "is_weight",
    "is_truncated",
)
MAXIMA = ("log_ratio_abs", "sampler_log_ratio_abs")


@dataclass(frozen=True)
class LossStats:
    """Sums over loss tokens (float64 [len(SUMS)]) and maxima over them (float64 [len(MAXIMA)]).

    ``a + b`` merges micro-batches. Over ranks: all-reduce ``sums`` with SUM and ``maxima`` with MAX.
    """

    sums: Tensor
    maxima: Tensor

    @classmethod
    def zeros(cls, device: torch.device | str = "cpu") -> "LossStats":
        """The neutral element of ``+``."""
        return cls(
            torch.zeros(len(SUMS), dtype=torch.float64, device=device),
            torch.zeros(len(MAXIMA), dtype=torch.float64, device=device),
        )

    @classmethod
    def of(cls, sums: dict[str, Tensor], maxima: dict[str, Tensor]) -> "LossStats":
        """From scalars, by the names in SUMS and MAXIMA."""
        return cls(
            torch.stack([sums[name].detach().double() for name in SUMS]),
            torch.stack([maxima[name].detach().double() for name in MAXIMA]),
        )

    def __add__(self, other: "LossStats") -> "LossStats":
        return LossStats(self.sums + other.sums, torch.maximum(self.maxima, other.maxima))


def finalise(stats: LossStats) -> dict[str, float]:
    """Metrics of one optimiser step from its merged statistics. Means are per loss token, log-ratios in nats, raw
    (before any clamp or truncation).

    ``grpo/loss`` the step's loss; ``grpo/kl`` to the reference (absent when no reference was given);
    ``grpo/clip_fraction`` tokens whose surrogate gradient the clip removed; ``grpo/ratio_mean`` of pi / pi_old;
    ``grpo/log_ratio_mean``, ``grpo/log_ratio_abs_max`` of log pi - log pi_old; ``grpo/sampler_kl`` k3 estimate of
    KL(sampler || learner); ``grpo/sampler_log_ratio_abs_max`` of log pi - log mu; ``grpo/is_weight_mean``,
    ``grpo/is_truncated_fraction`` of the truncated importance weights (1 and 0 when they are off).

    Raises ValueError when there was no loss token: such a step has no metrics and must be skipped.
    """
    sums = dict(zip(SUMS, stats.sums.tolist(), strict=True))
    maxima = dict(zip(MAXIMA, stats.maxima.tolist(), strict=True))
    tokens = sums["tokens"]
    if tokens == 0:
        raise ValueError("no loss token in this step: skip a step in which every group was dropped")
    metrics = {
        "grpo/loss": sums["loss"],
        "grpo/clip_fraction": sums["clipped"] / tokens,
        "grpo/ratio_mean": sums["ratio"] / tokens,
        "grpo/log_ratio_mean": sums["log_ratio"] / tokens,
        "grpo/log_ratio_abs_max": maxima["log_ratio_abs"],
        "grpo/sampler_kl": sums["sampler_kl"] / tokens,
        "grpo/sampler_log_ratio_abs_max": maxima["sampler_log_ratio_abs"],
        "grpo/is_weight_mean": sums["is_weight"] / tokens,
        "grpo/is_truncated_fraction": sums["is_truncated"] / tokens,
    }
    if sums["kl_tokens"] > 0:
        metrics["grpo/kl"] = sums["kl"] / sums["kl_tokens"]
    return metrics
