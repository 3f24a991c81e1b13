"""KL estimators and importance ratios. Numbers in the names are those of shared/pitfalls.md, part 1."""

import math

import pytest
import torch

from vlcot.grpo import k1, k2, k3, truncated_importance_weights
from vlcot.grpo.corrections import importance_ratio

pytestmark = pytest.mark.unit

POLICY = torch.tensor([0.5, -1.0, 0.3, 1.2, -0.4], dtype=torch.float64)
REFERENCE = torch.tensor([0.1, 0.2, -0.8, 0.9, 0.6], dtype=torch.float64).log_softmax(0)
STALE = torch.tensor([0.2, -0.3, 0.1, 0.9, 0.3], dtype=torch.float64).log_softmax(0)


def kl(a, b):
    return (a.exp() * (a - b)).sum()


def gradient(function):
    """Derivative by the five logits of ``function(log pi)``."""
    logits = POLICY.clone().requires_grad_()
    (result,) = torch.autograd.grad(function(logits.log_softmax(0)), logits)
    return result


def expectation(sampler, per_token):
    """Mean over the five tokens under ``sampler``, whose probabilities carry no gradient: what sampling estimates."""
    return gradient(lambda policy: (sampler.exp().detach() * per_token(policy)).sum())


def test_literal_values():
    policy, reference = torch.tensor([0.5]).log(), torch.tensor([0.25]).log()
    assert k1(policy, reference).item() == pytest.approx(0.6931472)
    assert k2(policy, reference).item() == pytest.approx(0.2402265)
    assert k3(policy, reference).item() == pytest.approx(0.1931472)
    assert k3(policy, policy).item() == 0.0


def test_pitfall_9_k1_and_k3_estimate_the_kl_and_k2_does_not():
    policy = POLICY.log_softmax(0)
    exact = kl(policy, REFERENCE).item()
    mean = {k.__name__: (policy.exp() * k(policy, REFERENCE)).sum().item() for k in (k1, k2, k3)}
    assert mean["k1"] == pytest.approx(exact, abs=1e-12)
    assert mean["k3"] == pytest.approx(exact, abs=1e-12)
    assert abs(mean["k2"] - exact) > 0.01


def test_pitfall_9_mean_gradient_of_each_estimator_on_policy():
    policy = POLICY.log_softmax(0)
    reverse = gradient(lambda p: kl(p, REFERENCE))
    forward = gradient(lambda p: kl(REFERENCE, p))
    assert (reverse - forward).abs().max() > 0.05

    torch.testing.assert_close(expectation(policy, lambda p: k1(p, REFERENCE)), torch.zeros_like(POLICY))
    torch.testing.assert_close(expectation(policy, lambda p: k2(p, REFERENCE)), reverse)
    torch.testing.assert_close(expectation(policy, lambda p: k3(p, REFERENCE)), forward)


@pytest.mark.parametrize("estimator", [k1, k3])
@pytest.mark.parametrize("stale", [False, True])
def test_pitfall_9_weighted_by_the_ratio_the_mean_gradient_is_exact_on_and_off_policy(estimator, stale):
    sampler = STALE if stale else POLICY.log_softmax(0)
    weighted = expectation(sampler, lambda p: importance_ratio(p, sampler.detach()) * estimator(p, REFERENCE))
    torch.testing.assert_close(weighted, gradient(lambda p: kl(p, REFERENCE)))


def test_pitfall_9_k3_keeps_pulling_back_a_policy_far_surer_than_the_reference():
    policy = torch.tensor([-0.1, -0.1], requires_grad=True)
    value = k3(policy, torch.tensor([-30.1, -1000.1]))
    value.sum().backward()
    assert value.tolist() == pytest.approx([29.0, 999.0])
    assert policy.grad.tolist() == pytest.approx([1.0, 1.0])


@pytest.mark.parametrize("gap", [1e3, -1e3])
@pytest.mark.parametrize("estimator", [k1, k2, k3])
def test_pitfall_14_a_log_ratio_of_1000_stays_finite(gap, estimator):
    policy = torch.tensor([-1.0], requires_grad=True)
    ratio = importance_ratio(policy, policy.detach() - gap)
    (ratio + estimator(policy, policy.detach() + gap)).sum().backward()
    assert ratio.item() == pytest.approx(math.exp(math.copysign(20, gap)))
    assert policy.grad.isfinite().all()


def test_pitfall_13_truncated_weights_hold_their_bound_and_carry_no_gradient():
    old = torch.tensor([-1.0, -1.0, -1.0, 1e3], requires_grad=True)
    behaviour = torch.tensor([-1.0 - math.log(5), -1.0 - math.log(1.5), -1.0 + math.log(4), 0.0])
    weights = truncated_importance_weights(old, behaviour, cap=2.0)
    assert weights.tolist() == pytest.approx([2.0, 1.5, 0.25, 2.0])
    assert not weights.requires_grad


def test_pitfall_12_a_drift_of_0_005_over_2000_tokens_leaves_every_weight_near_one():
    behaviour = torch.full((2000,), -5.0)
    for drift in (0.005, -0.005):
        weights = truncated_importance_weights(behaviour + drift, behaviour, cap=2.0)
        torch.testing.assert_close(weights, torch.full((2000,), math.exp(drift)), rtol=1e-5, atol=0)
