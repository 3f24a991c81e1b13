"""Ratios of two policies on the same tokens, kept finite."""

import torch
from torch import Tensor

LOG_RATIO_LIMIT = 20.0
"""Log-ratios are clamped to +-20 before exp: e^20 = 4.9e8 stays finite in float32 after any product made here."""


def importance_ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """``exp(numerator - denominator)`` per token, for log-probabilities [T] in nats.

    The difference is clamped to +-LOG_RATIO_LIMIT first; a token beyond it has a constant ratio and no gradient.
    """
    return (numerator - denominator).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()


def truncated_importance_weights(old: Tensor, behaviour: Tensor, cap: float) -> Tensor:
    """Token weights ``min(pi_old / mu, cap)`` [T], detached. Each lies in (0, cap]; below the cap
    it is unchanged.

    old: log-probs of the learner's policy at the start of the step; behaviour: of the policy that sampled (nats).
    Per token on purpose: a product over thousands of image tokens runs to 0 or infinity at a drift of 0.005.
    """
    with torch.no_grad():
        return importance_ratio(old, behaviour).clamp(max=cap)
