"""Pitfall 7: however a step is cut into micro-batches and ranks, its gradient is the same."""

import numpy as np
import pytest
import torch

from tests.vlcot.grpo_oracle import packed, random_sequences
from vlcot.grpo import (
    Denominators,
    LossConfig,
    LossStats,
    count_denominators,
    finalise,
    grpo_loss,
)

pytestmark = pytest.mark.unit

LENGTHS = [3, 17, 1, 8, 5, 29, 2, 11, 7, 4, 13, 6, 19, 1, 9, 10]
KEEP = [i not in (4, 11) for i in range(16)]
CONFIGS = [
    LossConfig(),
    LossConfig(normalisation="token", is_truncation=1.1),
    LossConfig(normalisation="dr_grpo", max_tokens=40, kl_importance_weighted=True),
]
SPLITS = {
    "16x1": [[i] for i in range(16)],
    "4x4": [list(range(i, i + 4)) for i in (0, 4, 8, 12)],
    "by tokens": [[5], [12, 7], [1, 15], [0, 2, 3, 4, 6, 8, 9, 10, 11, 13, 14]],
    "one has only dropped samples": [[4, 11], [i for i in range(16) if i not in (4, 11)]],
}


class Step:
    """Sixteen sequences, and a model of four weights that shifts the log-prob of every token."""

    def __init__(self):
        self.sequences = random_sequences(LENGTHS, seed=7)
        rng = np.random.default_rng(77)
        self.features = [torch.from_numpy(rng.normal(size=(n, 4))) for n in LENGTHS]

    def micro_batch(self, rows, weights):
        batch = packed([self.sequences[i] for i in rows])
        batch["logprobs"] = batch["logprobs"].detach() + torch.cat([self.features[i] for i in rows]) @ weights
        return batch | {"keep": torch.tensor([KEEP[i] for i in rows])}

    def count(self, rows):
        batch = self.micro_batch(rows, torch.zeros(4, dtype=torch.float64))
        return count_denominators(batch["keep"], batch["token_mask"], batch["sequence_index"])

    def accumulate(self, micro_batches, config, denominators, scale=1.0):
        """What one rank does: backward of every micro-batch into the same weights."""
        weights = torch.zeros(4, dtype=torch.float64, requires_grad=True)
        stats = LossStats.zeros()
        for rows in micro_batches:
            loss, part = grpo_loss(**self.micro_batch(rows, weights), config=config, denominators=denominators)
            (loss * scale).backward()
            stats = stats + part
        return weights.grad, stats


@pytest.fixture(scope="module")
def step():
    return Step()


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.normalisation)
@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS.keys())
def test_pitfall_7_micro_batches(step, config, split):
    whole = step.count(range(16))
    wanted, wanted_stats = step.accumulate([list(range(16))], config, whole)
    gradient, stats = step.accumulate(split, config, whole)
    assert wanted.abs().min() > 1e-4
    torch.testing.assert_close(gradient, wanted, rtol=1e-12, atol=1e-15)
    assert finalise(stats) == pytest.approx(finalise(wanted_stats), rel=1e-12)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.normalisation)
def test_pitfall_7_two_ranks_whose_engine_averages(step, config):
    ranks = [[[0, 1, 2], [3, 4, 5, 6, 7, 8]], [[9, 10], [11, 12, 13, 14, 15]]]
    whole = sum((step.count(rows) for rank in ranks for rows in rank), Denominators(0, 0))
    assert whole == step.count(range(16))
    wanted, wanted_stats = step.accumulate([list(range(16))], config, whole)
    # The engine divides by 2 accumulation steps and averages over 2 ranks; the learner scales by 2 * 2.
    results = [step.accumulate(rank, config, whole, scale=4.0) for rank in ranks]
    averaged = sum(gradient / 2 for gradient, _ in results) / 2
    torch.testing.assert_close(averaged, wanted, rtol=1e-12, atol=1e-15)
    merged = LossStats(
        sums=results[0][1].sums + results[1][1].sums,
        maxima=torch.maximum(results[0][1].maxima, results[1][1].maxima),
    )
    assert finalise(merged) == pytest.approx(finalise(wanted_stats), rel=1e-12)


@pytest.mark.parametrize("normalisation", ["token", "sequence"])
def test_pitfall_7_denominators_of_the_micro_batch_alone_would_be_wrong(step, normalisation):
    """That the other tests can fail: the mean of micro-batch means is another gradient."""
    config = LossConfig(normalisation=normalisation)
    split = SPLITS["by tokens"]
    wanted, _ = step.accumulate([list(range(16))], config, step.count(range(16)))
    local = sum(step.accumulate([rows], config, step.count(rows))[0] for rows in split) / len(split)
    assert (local - wanted).abs().max() > 1e-2


def test_pitfall_7_ten_and_six_tokens_in_literal_numbers():
    """A = 1 on 10 tokens and A = -1 on 6: by token -(10 - 6) / 16, by sequence 0, by a budget of 20 -(10 - 6) / 40."""

    def total(config):
        loss = 0.0
        for tokens, advantage in ((10, 1.0), (6, -1.0)):
            policy = torch.full((tokens,), -1.0, requires_grad=True)
            part, _ = grpo_loss(
                policy,
                old_logprobs=policy.detach(),
                reference_logprobs=policy.detach(),
                advantages=torch.tensor([advantage]),
                keep=torch.tensor([True]),
                token_mask=torch.ones(tokens, dtype=torch.bool),
                sequence_index=torch.zeros(tokens, dtype=torch.int64),
                config=config,
                denominators=Denominators(sequences=2, tokens=16),
            )
            loss += part.item()
        return loss

    assert total(LossConfig(normalisation="token")) == pytest.approx(-0.25)
    assert total(LossConfig()) == pytest.approx(0.0, abs=1e-7)
    assert total(LossConfig(normalisation="dr_grpo", max_tokens=20)) == pytest.approx(-0.1)
