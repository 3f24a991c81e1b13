"""Who is trained on, with which advantage, where."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from learners.batching import (
    MicroBatch,
    TrainingSequence,
    build_batch,
    collate,
    idle_micro_batch,
    plan_micro_batches,
)
from learners.spec import LearnerSpec
from tests.learners.synthetic import PlainPolicy, scored_groups, with_samples
from vlcot.grammar import Support
from vlcot.groups import ScoredGroup, VersionSpan
from vlcot.grpo import AdvantageConfig

pytestmark = pytest.mark.unit


@pytest.fixture(scope="module")
def policy(policy_path: Path) -> PlainPolicy:
    return PlainPolicy(policy_path, 0.9)


@pytest.fixture(scope="module")
def groups(policy: PlainPolicy) -> list[ScoredGroup]:
    """Three groups of four; the first sample of the first has failed."""
    return scored_groups(policy, seed=3, invalid=1)


def test_failed_samples_leave_no_trace(groups: list[ScoredGroup], spec: LearnerSpec) -> None:
    """Pitfall 5: not in the mean, the standard deviation, the sequences or the denominators."""
    batch = build_batch(groups, 0, spec)
    first = [s for s in batch.sequences if s.group == 0]
    rewards = groups[0].totals[1:]
    expected = (rewards - rewards.mean()) / (rewards.std(ddof=1) + spec.advantage.eps)
    np.testing.assert_allclose([s.advantage for s in first], expected, rtol=1e-6)
    assert batch.denominators.sequences == 11
    assert batch.denominators.tokens == sum(int((s.sample.supports > 0).sum()) for s in batch.sequences)
    assert batch.metrics["failures/samples_failed"] == 1
    assert batch.metrics["failures/samples_dropped"] == 1


def test_advantages_stay_with_their_samples_when_groups_are_dropped(groups: list[ScoredGroup], spec) -> None:
    """Pitfall 6: a dropped group shifts nobody's advantage."""
    flat = replace(groups[1], totals=np.full(4, 0.25))
    dropping = replace(spec, advantage=AdvantageConfig(drop_zero_variance=True))
    with_flat = build_batch([groups[0], flat, groups[2]], 0, dropping)
    without = build_batch([groups[0], groups[2]], 0, dropping)
    assert [s.advantage for s in with_flat.sequences] == [s.advantage for s in without.sequences]
    assert [s.sample for s in with_flat.sequences] == [s.sample for s in without.sequences]
    assert with_flat.denominators == without.denominators
    assert with_flat.metrics["batch/zero_variance_groups"] == 1
    assert with_flat.metrics["failures/samples_dropped"] == 5


def test_a_step_without_trainable_groups_has_no_tokens(groups: list[ScoredGroup], spec: LearnerSpec) -> None:
    """Pitfall 2: one valid sample of four is no group."""
    lone = replace(groups[0], valid=np.array([False, True, False, False]))
    batch = build_batch([lone], 0, spec)
    assert batch.sequences == () and batch.denominators.tokens == 0
    assert batch.metrics["failures/groups_too_small"] == 1


def test_staleness_is_measured_and_bounded(groups: list[ScoredGroup], spec: LearnerSpec) -> None:
    """Pitfall 23: weights 3 may train what weights 2 began, not what weights 1 did; nobody samples the future."""
    length = len(groups[1].group.samples[0].ids)
    mixed = replace(
        groups[1],
        group=replace(
            groups[1].group,
            samples=tuple(
                replace(s, versions=(VersionSpan(2, 0, 4), VersionSpan(3, 4, len(s.ids))))
                for s in groups[1].group.samples
            ),
        ),
    )
    assert length > 4
    current = [with_versions(groups[0], 3), mixed]
    batch = build_batch(current, 3, spec)
    assert batch.metrics["staleness/max"] == 1
    assert batch.metrics["staleness/mean"] == pytest.approx(4 / 7)
    assert [s.fresh for s in batch.sequences] == [True] * 3 + [False] * 4
    with pytest.raises(ValueError, match="2 versions older"):
        build_batch(current, 4, spec)
    with pytest.raises(ValueError, match="made by weights 3"):
        build_batch(current, 2, spec)


def with_versions(group: ScoredGroup, version: int) -> ScoredGroup:
    samples = tuple(replace(s, versions=(VersionSpan(version, 0, len(s.ids)),)) for s in group.group.samples)
    return replace(group, group=replace(group.group, samples=samples))


def test_groups_that_do_not_fit_are_refused(groups: list[ScoredGroup], spec: LearnerSpec) -> None:
    with pytest.raises(ValueError, match="stands twice"):
        build_batch([groups[0], groups[0]], 0, spec)
    with pytest.raises(ValueError, match="1 to 3 groups"):
        build_batch([], 0, spec)
    with pytest.raises(ValueError, match="equally many"):
        build_batch([with_samples(groups[0], logprobs=np.zeros(3, np.float32))], 0, spec)
    with pytest.raises(ValueError, match="spans do not cover"):
        build_batch([with_samples(groups[0], versions=(VersionSpan(0, 0, 5),))], 0, spec)


def lengths_only(groups: list[tuple[int, list[int]]]) -> list[TrainingSequence]:
    """Sequences of these prompt and chain lengths."""
    return [
        TrainingSequence(np.zeros(prompt, np.int32), SimpleNamespace(ids=np.zeros(chain)), 0.0, group, True)
        for group, (prompt, chains) in enumerate(groups)
        for chain in chains
    ]


@given(
    groups=st.lists(
        st.tuples(st.sampled_from([5, 9]), st.lists(st.integers(1, 60), min_size=1, max_size=8)), max_size=9
    ),
    ranks=st.integers(1, 5),
    budget=st.integers(1, 300),
)
def test_plan_covers_every_row_once_and_keeps_ranks_in_step(groups, ranks, budget) -> None:
    """Pitfall 7: ZeRO-3 is collective, so every rank runs as many micro-batches."""
    sequences = lengths_only(groups)
    plan = plan_micro_batches(sequences, ranks, budget)
    assert len(plan) == ranks and len({len(batches) for batches in plan}) == 1
    batches = [batch for of_rank in plan for batch in of_rank if batch]
    rows = sorted(row for batch in batches for share in batch for row in share.rows)
    assert rows == list(range(len(sequences)))
    for batch in batches:
        found = [[sequences[row] for row in share.rows] for share in batch]
        assert len({len(s.prompt) for share in found for s in share}) == 1, "prompts of one length"
        assert all(len({s.group for s in share}) == 1 for share in found), "chains of one prompt"
        chains = [len(s.sample.ids) for share in found for s in share]
        tokens = len(found) * len(found[0][0].prompt) + len(chains) * max(chains)
        assert tokens <= budget or len(chains) == 1


@given(st.integers(1, 6), st.integers(1, 5))
def test_groups_that_fit_stay_whole_and_spread_over_ranks(groups, ranks) -> None:
    """The prompt is computed once a group; fewer groups than ranks are cut so that nobody is idle."""
    plan = plan_micro_batches(lengths_only([(40, [50] * 8)] * groups), ranks, 10_000)
    shares = [share for of_rank in plan for batch in of_rank for share in batch]
    loads = [sum(share.tokens for batch in of_rank for share in batch) for of_rank in plan]
    if groups >= ranks:
        assert len(shares) == groups
    assert min(loads) > 0 and max(loads) - min(loads) <= max(share.tokens for share in shares)


def test_padding_is_known_by_length_not_by_id(groups: list[ScoredGroup], spec: LearnerSpec) -> None:
    """Pitfall 19: the end-of-turn id used as padding, several of it in a chain or none: the same mask."""
    sequences = build_batch(groups, 0, spec).sequences[:3]
    turn_end = int(sequences[0].sample.ids[-1])
    micro = collate([sequences], pad=turn_end)
    for row, sequence in enumerate(sequences):
        length = len(sequence.sample.ids)
        mask = micro.token_mask[row].numpy()
        np.testing.assert_array_equal(mask[:length], sequence.sample.supports != int(Support.FORCED))
        assert not mask[length:].any() and mask[length - 1]


def test_image_tokens_are_trained_and_forced_ones_are_not(groups: list[ScoredGroup], spec: LearnerSpec) -> None:
    """Pitfall 20: a chain cut by its length is trained like any other; row ends carry no loss."""
    (sequence, *_) = build_batch(groups, 0, spec).sequences
    micro = collate([[sequence]], pad=0)
    kinds = sequence.sample.supports
    assert sequence.sample.finish_reason == "length"
    assert (kinds == int(Support.CODE)).sum() > 0 and (kinds == int(Support.FORCED)).sum() > 0
    assert int(micro.token_mask.sum()) == int((kinds != int(Support.FORCED)).sum())
    assert bool((micro.fresh == micro.token_mask).all())


def test_padded_logprobs_equal_unpadded_ones(policy: PlainPolicy, groups: list[ScoredGroup], spec) -> None:
    """Pitfall 21: no shift at the prompt's end, in rows of any length."""
    sequences = build_batch(groups, 0, spec).sequences
    for group in range(3):  # their prompts have different lengths
        micro = collate([[s for s in sequences if s.group == group]], pad=policy.family.vocabulary.pad)
        with torch.no_grad():
            logprobs = chain_logprobs(policy, micro)
        torch.testing.assert_close(logprobs, micro.behaviour, rtol=0, atol=1e-5)


def chain_logprobs(policy: PlainPolicy, micro: MicroBatch) -> torch.Tensor:
    return policy.model.chain_logprobs(
        micro.prompt_ids, micro.chain_ids, micro.supports, micro.counts, policy._table, 0.9
    )


def test_an_idle_micro_batch_gives_every_parameter_a_zero_gradient(policy: PlainPolicy) -> None:
    micro = idle_micro_batch(int(policy.family.vocabulary.text_ids[0]))
    policy.model.zero_grad()
    logprobs = chain_logprobs(policy, micro)
    torch.where(micro.token_mask & micro.keep[:, None], logprobs, 0.0).sum().backward()
    for name, parameter in policy.model.named_parameters():
        assert parameter.grad is not None and not parameter.grad.any(), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps is 0; it must be at least 1"),
        ({"temperature": 0.0}, "temperature is 0.0; it must be a positive number"),
        ({"schedule": "linear"}, "one of constant, cosine"),
        ({"dtype": "float16"}, "one of float32, bfloat16"),
        ({"warmup_steps": 9}, "no more than steps"),
        ({"reference_path": None}, "no reference_path"),
        ({"betas": (0.9, 1.0)}, "betas"),
    ],
)
def test_impossible_settings_are_refused_by_name(spec: LearnerSpec, change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(spec, **change)


def test_learning_rate_warms_up_and_falls() -> None:
    spec = LearnerSpec("p", "r", steps=6, groups_per_step=1, temperature=1.0, max_staleness=0, learning_rate=1.0)
    cosine = replace(spec, warmup_steps=2, schedule="cosine")
    expected = [0.5, 1.0, 1.0, 0.8535533905932737, 0.5, 0.14644660940672627]
    np.testing.assert_allclose([cosine.learning_rate_at(s) for s in range(1, 7)], expected)
    assert [spec.learning_rate_at(s) for s in (1, 6)] == [1.0, 1.0]
