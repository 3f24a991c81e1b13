"""The GRPO loss. Numbers in the names are those of shared/pitfalls.md, part 1."""

import math

import numpy as np
import pytest
import torch

from tests.vlcot.grpo_oracle import oracle_loss, packed, random_sequences
from vlcot.grpo import (
    AdvantageConfig,
    Denominators,
    LossConfig,
    LossStats,
    count_denominators,
    finalise,
    group_advantages,
    grpo_loss,
    packed_sequence_index,
)

pytestmark = pytest.mark.unit

NAN = math.nan


def run(batch, **config):
    """Loss, gradient by log-prob and metrics of a batch that is a whole step."""
    denominators = count_denominators(batch["keep"], batch["token_mask"], batch["sequence_index"])
    loss, stats = grpo_loss(**batch, config=LossConfig(**config), denominators=denominators)
    (gradient,) = torch.autograd.grad(loss, batch["logprobs"])
    return loss.item(), gradient.tolist(), finalise(stats)


def one_sequence(log_ratios, advantage, **extra):
    """A sequence of sampled tokens with these log(pi / pi_old); the reference equals the policy."""
    policy = torch.full((len(log_ratios),), -2.0, dtype=torch.float64)
    return {
        "logprobs": policy.clone().requires_grad_(),
        "old_logprobs": policy - torch.tensor(log_ratios, dtype=torch.float64),
        "reference_logprobs": policy,
        "advantages": torch.tensor([advantage]),
        "keep": torch.tensor([True]),
        "token_mask": torch.ones(len(log_ratios), dtype=torch.bool),
        "sequence_index": torch.zeros(len(log_ratios), dtype=torch.int64),
        **extra,
    }


def two_sequences():
    """Sequence 0, A = 1: ratio 1 at the reference; ratio e^0.5 with pi_ref / pi = 2. Sequence 1, A = -2: ratio 1 at the
    reference. Between them a forced token and a failed sample full of NaN."""
    return {
        "logprobs": torch.tensor([-1.0, 0.0, -2.0, NAN, -3.0], requires_grad=True),
        "old_logprobs": torch.tensor([-1.0, NAN, -2.5, NAN, -3.0]),
        "reference_logprobs": torch.tensor([-1.0, math.inf, -2.0 + math.log(2), NAN, -3.0]),
        "advantages": torch.tensor([1.0, NAN, -2.0]),
        "keep": torch.tensor([True, False, True]),
        "token_mask": torch.tensor([True, False, True, True, True]),
        "sequence_index": torch.tensor([0, 0, 0, 1, 2]),
    }


# Token losses: -1; -1.2 + 0.04 * (2 - ln 2 - 1) = -1.1877259; 2.
@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, 0.4530685),  # ((-1 - 1.1877259) / 2 + 2) / 2
        ({"normalisation": "token"}, -0.0625753),  # (-1 - 1.1877259 + 2) / 3
        ({"normalisation": "dr_grpo", "max_tokens": 10}, -0.0093863),  # (-1 - 1.1877259 + 2) / 20
    ],
)
def test_pitfall_8_literal_loss_with_the_kl_added_per_token_before_any_mean(config, expected):
    assert run(two_sequences(), **config)[0] == pytest.approx(expected, abs=1e-6)


def test_pitfall_5_and_8_literal_gradient_and_metrics_past_forced_tokens_and_failed_samples():
    _, gradient, metrics = run(two_sequences())
    # -1 / 2 / 2; forced; clipped, so only 0.04 * (1 - 2) / 2 / 2; failed; 2 / 1 / 2.
    assert gradient == pytest.approx([-0.25, 0.0, -0.01, 0.0, 1.0], abs=1e-7)
    assert metrics["grpo/loss"] == pytest.approx(0.4530685, abs=1e-6)
    assert metrics["grpo/kl"] == pytest.approx(0.3068528 / 3, abs=1e-6)
    assert metrics["grpo/clip_fraction"] == pytest.approx(1 / 3)
    assert metrics["grpo/ratio_mean"] == pytest.approx((1 + math.exp(0.5) + 1) / 3)
    assert metrics["grpo/log_ratio_mean"] == pytest.approx(0.5 / 3)
    assert metrics["grpo/log_ratio_abs_max"] == pytest.approx(0.5)
    assert metrics["grpo/sampler_kl"] == pytest.approx((math.exp(0.5) - 1.5) / 3)
    assert (metrics["grpo/is_weight_mean"], metrics["grpo/is_truncated_fraction"]) == (1.0, 0.0)


def test_pitfall_8_the_kl_has_a_gradient_of_its_own():
    batch = two_sequences() | {"advantages": torch.zeros(3)}
    assert run(batch)[1] == pytest.approx([0.0, 0.0, -0.01, 0.0, 0.0], abs=1e-8)
    assert run(batch, kl_beta=0.0)[1] == [0.0] * 5


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    ("config", "oracle"),
    [
        ({}, {}),
        ({"normalisation": "token", "kl_beta": 0.3}, {"normalisation": "token", "beta": 0.3}),
        ({"normalisation": "dr_grpo", "max_tokens": 17}, {"normalisation": "dr_grpo", "max_tokens": 17}),
        ({"clip_low": 0.1, "clip_high": 0.28, "dual_clip": 1.5}, {"low": 0.1, "high": 0.28, "dual_clip": 1.5}),
        ({"is_truncation": 1.1}, {"cap": 1.1}),
    ],
)
def test_loss_and_gradient_against_the_oracle(config, oracle, seed):
    sequences = random_sequences([1, 9, 4, 13, 2, 7], seed)
    loss, gradient, metrics = run(packed(sequences), **config)
    wanted, wanted_gradient = oracle_loss(sequences, **oracle)
    assert loss == pytest.approx(wanted, rel=1e-12)
    assert gradient == pytest.approx(wanted_gradient, rel=1e-10, abs=1e-14)
    assert metrics["grpo/clip_fraction"] > 0


def test_pitfall_5_a_failed_sample_changes_nothing_even_if_its_tokens_travel_along():
    sequences = random_sequences([5, 8, 6], seed=5)
    with_failed = packed(sequences) | {"keep": torch.tensor([True, False, True])}
    loss, gradient, metrics = run(with_failed)
    loss_without, gradient_without, metrics_without = run(packed([sequences[0], sequences[2]]))
    assert loss == pytest.approx(loss_without, rel=1e-12)
    assert gradient == pytest.approx(gradient_without[:5] + [0.0] * 8 + gradient_without[5:], abs=1e-14)
    assert metrics == pytest.approx(metrics_without)


def test_pitfall_6_a_dropped_zero_variance_group_adds_neither_kl_nor_denominator():
    sequences = random_sequences([5, 8, 6, 7], seed=6)
    rewards = torch.tensor([1.0, 0.0, 0.5, 0.5], dtype=torch.float64)
    groups, valid = torch.tensor([0, 0, 1, 1]), torch.ones(4, dtype=torch.bool)
    losses = {}
    for drop in (False, True):
        values, keep = group_advantages(rewards, valid, groups, AdvantageConfig(drop_zero_variance=drop))
        losses[drop], gradient, _ = run(packed(sequences) | {"advantages": values.double(), "keep": keep})
        assert (np.abs(gradient[13:]).max() > 0) == (not drop)
    alone, _ = group_advantages(rewards[:2], valid[:2], groups[:2], AdvantageConfig())
    expected = run(packed(sequences[:2]) | {"advantages": alone.double()})[0]
    assert losses[True] == pytest.approx(expected, rel=1e-12)
    assert losses[False] != pytest.approx(expected, rel=1e-3)


def test_pitfall_10_a_fresh_batch_is_never_clipped_and_a_stale_one_is():
    torch.manual_seed(10)
    logits = torch.randn(200, 5, dtype=torch.float64, requires_grad=True)
    ids = torch.randint(5, (200, 1))

    def metrics_after_update(update):
        sampled = logits.log_softmax(-1).gather(1, ids).squeeze(1).detach()
        policy = (logits.detach() + update).requires_grad_().log_softmax(-1).gather(1, ids).squeeze(1)
        batch = one_sequence([0.0] * 200, 1.0) | {"logprobs": policy, "old_logprobs": sampled}
        return run(batch, kl_beta=0.0)[2]

    fresh = metrics_after_update(torch.zeros_like(logits))
    assert fresh["grpo/clip_fraction"] == 0.0
    assert fresh["grpo/ratio_mean"] == 1.0
    assert fresh["grpo/sampler_kl"] == 0.0
    stale = metrics_after_update(0.5 * torch.randn_like(logits))
    assert stale["grpo/clip_fraction"] > 0.1
    assert stale["grpo/ratio_mean"] != 1.0
    assert stale["grpo/sampler_kl"] > 0.01


@pytest.mark.parametrize(
    ("advantage", "ratio", "config", "surrogate", "cut"),
    [
        (+1.0, 1.1, {}, 1.1, False),
        (+1.0, 0.9, {}, 0.9, False),
        (+1.0, 1.5, {}, 1.2, True),
        (+1.0, 0.5, {}, 0.5, False),
        (-1.0, 1.1, {}, -1.1, False),
        (-1.0, 0.9, {}, -0.9, False),
        (-1.0, 1.5, {}, -1.5, False),
        (-1.0, 0.5, {}, -0.8, True),
        (+1.0, 1.25, {"clip_high": 0.28}, 1.25, False),
        (-1.0, 0.75, {"clip_high": 0.28}, -0.8, True),
        (-1.0, 2.5, {"dual_clip": 3.0}, -2.5, False),
        (-1.0, 4.0, {"dual_clip": 3.0}, -3.0, True),
        (+1.0, 4.0, {"dual_clip": 3.0}, 1.2, True),
        (-1.0, 0.5, {"dual_clip": 3.0}, -0.8, True),
        (0.0, 1.5, {}, 0.0, False),
    ],
)
def test_pitfall_11_clip_sign_table(advantage, ratio, config, surrogate, cut):
    loss, gradient, metrics = run(one_sequence([math.log(ratio)], advantage), **config)
    assert loss == pytest.approx(-surrogate)
    assert gradient[0] == (0.0 if cut else pytest.approx(-ratio * advantage))
    assert metrics["grpo/clip_fraction"] == float(cut)


@pytest.mark.parametrize("drift", [0.005, -0.005])
def test_pitfall_12_a_constant_drift_over_2000_tokens_stays_finite_and_unmasked(drift):
    batch = one_sequence([drift] * 2000, 1.0)
    loss, gradient, metrics = run(batch | {"behaviour_logprobs": batch["old_logprobs"] - drift}, is_truncation=2.0)
    assert loss == pytest.approx(-math.exp(2 * drift))  # one token's ratio times its weight; the product is e^(+-10)
    assert gradient == pytest.approx([-math.exp(2 * drift) / 2000] * 2000)
    assert metrics["grpo/clip_fraction"] == 0.0
    assert metrics["grpo/is_truncated_fraction"] == 0.0
    assert metrics["grpo/is_weight_mean"] == pytest.approx(math.exp(drift))


def test_pitfall_13_truncation_bounds_the_surrogate_alone_and_the_raw_ratio_is_reported():
    batch = one_sequence([0.0, 0.0], 1.0)
    batch["behaviour_logprobs"] = batch["old_logprobs"] - torch.tensor([math.log(5), math.log(1.5)])
    batch["reference_logprobs"] = batch["reference_logprobs"] + math.log(2)
    loss, gradient, metrics = run(batch, is_truncation=2.0)
    kl = 1 - math.log(2)
    assert loss == pytest.approx(-(2.0 + 1.5) / 2 + 0.04 * kl)
    assert gradient == pytest.approx([(-2.0 - 0.04) / 2, (-1.5 - 0.04) / 2])
    assert metrics["grpo/is_weight_mean"] == pytest.approx(1.75)
    assert metrics["grpo/is_truncated_fraction"] == 0.5
    assert metrics["grpo/sampler_log_ratio_abs_max"] == pytest.approx(math.log(5))


@pytest.mark.parametrize("log_ratio", [1e3, -1e3])
@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize("weighted", [False, True])
def test_pitfall_14_a_log_ratio_of_1000_gives_finite_loss_and_gradient_in_float32(log_ratio, advantage, weighted):
    batch = one_sequence([log_ratio], advantage)
    batch = {k: v.float() if v.dtype == torch.float64 else v for k, v in batch.items()}
    batch["logprobs"] = batch["logprobs"].detach().requires_grad_()
    batch["reference_logprobs"] = batch["logprobs"].detach() + log_ratio
    loss, gradient, metrics = run(batch, kl_importance_weighted=weighted)
    assert math.isfinite(loss) and math.isfinite(gradient[0])
    assert metrics["grpo/log_ratio_abs_max"] == pytest.approx(1e3)


def test_pitfall_1_0_an_identical_prefix_learns_nothing_when_every_token_counts_the_same():
    # Three samples share two tokens and then differ in length; their advantages sum to zero.
    values, keep = group_advantages(
        torch.tensor([0.2, 0.9, 0.4], dtype=torch.float64),
        torch.ones(3, dtype=torch.bool),
        torch.zeros(3, dtype=torch.int64),
        AdvantageConfig(),
    )
    lengths = torch.tensor([3, 5, 8])
    index = packed_sequence_index(lengths)
    position = torch.cat([torch.arange(n) for n in lengths.tolist()])
    prefix_gradient = {}
    for normalisation in ("token", "sequence"):
        policy = torch.full((16,), -1.0, dtype=torch.float64, requires_grad=True)
        batch = {
            "logprobs": policy,
            "old_logprobs": policy.detach(),
            "reference_logprobs": None,
            "advantages": values,
            "keep": keep,
            "token_mask": torch.ones(16, dtype=torch.bool),
            "sequence_index": index,
        }
        gradient = torch.tensor(run(batch, normalisation=normalisation, kl_beta=0.0)[1])
        prefix_gradient[normalisation] = gradient[position == 0].sum().item()
    assert prefix_gradient["token"] == pytest.approx(0.0, abs=1e-7)
    assert abs(prefix_gradient["sequence"]) > 1e-3


def test_pitfall_19_lengths_and_not_token_values_decide_what_is_lost():
    # End id 2 is also the padding id: ends at 2, never ends, ends in the last slot, holds 2 inside, is only the end.
    rows = torch.tensor([[5, 6, 2, 2, 2], [5, 6, 7, 8, 9], [5, 6, 7, 8, 2], [5, 2, 6, 2, 2], [2, 2, 2, 2, 2]])
    lengths = torch.tensor([3, 5, 5, 4, 1])
    index = packed_sequence_index(lengths)
    assert index.tolist() == [0] * 3 + [1] * 5 + [2] * 5 + [3] * 4 + [4]
    ids = rows[torch.arange(5) < lengths[:, None]]
    batch = one_sequence([0.0] * 18, 1.0) | {
        "advantages": torch.ones(5),
        "keep": torch.ones(5, dtype=torch.bool),
        "sequence_index": index,
    }
    _, gradient, _ = run(batch)
    assert gradient == pytest.approx([-1 / 5 / n for n in lengths.tolist() for _ in range(n)])
    assert [bool(g) for g in gradient] == [True] * 18 and (ids == 2).sum() == 5


def test_pitfall_20_a_sequence_that_fills_its_budget_is_a_sequence_like_any_other():
    full = run(one_sequence([0.0] * 12, 1.0), normalisation="dr_grpo", max_tokens=12)
    assert full[0] == pytest.approx(-1.0)
    assert full[1] == pytest.approx(run(one_sequence([0.0] * 12, 1.0))[1])


def test_a_sequence_without_loss_tokens_gives_no_nan_and_stays_in_the_denominator():
    batch = two_sequences()
    batch["token_mask"] = torch.tensor([True, False, True, True, False])
    loss, gradient, _ = run(batch)
    assert loss == pytest.approx(-1.0938629 / 2, abs=1e-6)
    assert gradient == pytest.approx([-0.25, 0.0, -0.01, 0.0, 0.0], abs=1e-7)


@pytest.mark.parametrize("normalisation", ["sequence", "token"])
@pytest.mark.parametrize("tokens", [0, 3])
def test_a_micro_batch_without_loss_tokens_still_goes_backward(normalisation, tokens):
    weight = torch.ones(1, requires_grad=True)
    loss, stats = grpo_loss(
        weight * torch.full((tokens,), -1.0),
        old_logprobs=torch.full((tokens,), NAN),
        reference_logprobs=torch.full((tokens,), NAN),
        advantages=torch.zeros(tokens),
        keep=torch.zeros(tokens, dtype=torch.bool),
        token_mask=torch.ones(tokens, dtype=torch.bool),
        sequence_index=torch.arange(tokens),
        config=LossConfig(normalisation=normalisation),
        denominators=Denominators(4, 40),
    )
    loss.backward()
    assert loss.item() == 0.0 and weight.grad.tolist() == [0.0]
    with pytest.raises(ValueError, match="no loss token in this step"):
        finalise(stats)


def test_bfloat16_log_probs_are_computed_on_in_float32():
    batch = one_sequence([0.0, 0.0], 1.0)
    batch = {k: v.bfloat16() if v.dtype == torch.float64 else v for k, v in batch.items()}
    batch["logprobs"] = batch["logprobs"].detach().requires_grad_()
    denominators = Denominators(3, 6)
    loss, _ = grpo_loss(**batch, config=LossConfig(), denominators=denominators)
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(-1 / 3, abs=1e-6)


def test_without_a_reference_no_kl_is_reported():
    batch = one_sequence([0.0], 1.0) | {"reference_logprobs": None}
    assert "grpo/kl" not in run(batch, kl_beta=0.0)[2]
    assert run(one_sequence([0.0], 1.0), kl_beta=0.0)[2]["grpo/kl"] == 0.0
    with pytest.raises(ValueError, match="reference_logprobs is None"):
        run(batch)


def test_the_anchors_carry_no_gradient_even_if_the_caller_forgot_to_detach():
    batch = one_sequence([0.0], 1.0)
    attached = batch | {"old_logprobs": batch["logprobs"], "reference_logprobs": batch["logprobs"]}
    assert run(attached)[1] == pytest.approx([-1.0])
    attached["reference_logprobs"] = batch["logprobs"] + math.log(2)
    assert run(attached)[1] == pytest.approx([-1.0 + 0.04 * (1 - 2)])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"old_logprobs": torch.zeros(2)}, r"old_logprobs has shape \[2\]; it must be \[5\]"),
        ({"token_mask": torch.ones(5)}, "token_mask is torch.float32"),
        ({"sequence_index": torch.tensor([0, 0, 0, 1, 3])}, r"sequence_index must lie in 0\.\.2"),
        ({"sequence_index": torch.tensor([0, 0, 0, 1, -1])}, r"sequence_index must lie in 0\.\.2"),
        ({"advantages": torch.tensor([1.0, 0.0, NAN])}, "advantages of kept sequences are not finite"),
        ({"logprobs": torch.tensor([-1.0, 0.0, -math.inf, 0.0, 0.0])}, r"'logprobs': 1.*outside the support"),
        ({"denominators": Denominators(1, 40)}, "below this micro-batch's own"),
        ({"denominators": Denominators(0, 0)}, "every group was dropped"),
        ({"config": LossConfig(is_truncation=2.0)}, "is_truncation needs behaviour_logprobs"),
    ],
)
def test_bad_input_is_named(change, message):
    arguments = two_sequences() | {"config": LossConfig(), "denominators": Denominators(2, 3)} | change
    with pytest.raises(ValueError, match=message):
        grpo_loss(**arguments)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"clip_low": 1.0}, "clip_low is 1.0"),
        ({"clip_high": 0.0}, "clip_high 0.0"),
        ({"kl_beta": -0.1}, "kl_beta is -0.1"),
        ({"kl": "k4"}, "kl 'k4' is unknown; allowed: k1, k2, k3"),
        ({"kl": "k1"}, "zero mean gradient"),
        ({"normalisation": "batch"}, "normalisation 'batch' is unknown; allowed: sequence, token, dr_grpo"),
        ({"normalisation": "dr_grpo"}, "max_tokens is None"),
        ({"max_tokens": 5}, "max_tokens is 5"),
        ({"normalisation": "dr_grpo", "max_tokens": 0}, "max_tokens is 0"),
        ({"dual_clip": 1.0}, "dual_clip is 1.0"),
        ({"is_truncation": 0.5}, "is_truncation is 0.5"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        LossConfig(**settings)


def test_k1_is_allowed_where_its_gradient_is_right():
    batch = one_sequence([0.0], 0.0)
    batch["reference_logprobs"] = batch["reference_logprobs"] - 0.7
    # d/dlogp of ratio * k1 at ratio 1: k1 + 1.
    assert run(batch, kl="k1", kl_importance_weighted=True)[1] == pytest.approx([0.04 * 1.7])


def test_statistics_of_nothing_are_the_neutral_element():
    _, stats = grpo_loss(**two_sequences(), config=LossConfig(), denominators=Denominators(2, 3))
    assert finalise(LossStats.zeros() + stats) == finalise(stats)
