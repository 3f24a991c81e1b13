"""Per-token estimators of KL(policy || reference) from tokens that the policy sampled.

Names and forms: J. Schulman, "Approximating KL divergence" (2020). With d = log pi_ref - log pi:

| name | value         | mean of the value | mean gradient, differentiated through pi         |
|------|---------------|-------------------|--------------------------------------------------|
| k1   | -d            | KL                | 0: as a loss it only adds noise                  |
| k2   | d^2 / 2       | biased            | the gradient of KL(policy || reference)          |
| k3   | e^d - d - 1   | KL                | the gradient of KL(reference || policy)          |

Multiplied by the importance ratio pi / pi_old with its gradient, k1 and k3 both have the gradient of
KL(policy || reference) as their mean, off-policy too (`LossConfig.kl_importance_weighted`).
"""

from collections.abc import Callable

from torch import Tensor

from vlcot.grpo.corrections import LOG_RATIO_LIMIT


def k1(logprobs: Tensor, reference: Tensor) -> Tensor:
    """``log pi - log pi_ref`` per token [T]. Unbiased, may be negative."""
    return logprobs - reference


def k2(logprobs: Tensor, reference: Tensor) -> Tensor:
    """``(log pi - log pi_ref)^2 / 2`` per token [T]. Biased, never negative."""
    return (logprobs - reference).square() / 2


def k3(logprobs: Tensor, reference: Tensor) -> Tensor:
    """``pi_ref / pi - log(pi_ref / pi) - 1`` per token [T]. Unbiased, never negative; the paper's KL.

    d is clamped from above only. Below, where the policy is far surer than the reference, the value grows like -d and
    its gradient is what pulls the policy back; no overflow threatens there.
    """
    d = (reference - logprobs).clamp(max=LOG_RATIO_LIMIT)
    return d.expm1() - d


KL_ESTIMATORS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"k1": k1, "k2": k2, "k3": k3}
