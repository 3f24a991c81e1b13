"""Supervised ZeRO-3 steps against plain torch, which masks whole logits; and a run that stops and goes on."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from learners.protocols import Example
from learners.spec import LearnerSpec
from tests.learners.ranks import run_ranks
from tests.learners.synthetic import Oracle, PlainPolicy, assert_same_update, random_chain, snapshot
from tests.learners.zero3_supervised import Z_LOSS, SupervisedJob
from vlcot.grammar import CHOICES, Support
from vlcot.grpo import LossConfig

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]
STEPS = 3


def some_examples(policy: PlainPolicy, seed: int, count: int = 5) -> list[Example]:
    """Questions and answers of uneven lengths."""
    rng = np.random.default_rng(seed)
    text = policy.family.vocabulary.text_ids
    return [
        Example(
            rng.choice(text, int(rng.integers(8, 20))).astype(np.int32),
            random_chain(policy.family.grammar, int(rng.integers(20, 48)), seed=int(rng.integers(1 << 30))),
        )
        for _ in range(count)
    ]


@pytest.fixture(scope="module")
def cold(spec: LearnerSpec) -> LearnerSpec:
    """No reference, no KL; a cosine that ends above 0."""
    loss = LossConfig(kl_beta=0.0)
    return replace(
        spec, reference_path=None, temperature=1.0, groups_per_step=5, loss=loss, min_learning_rate=1e-6, seed=3
    )


@pytest.fixture(scope="module")
def batches(cold: LearnerSpec) -> list[list[Example]]:
    plain = PlainPolicy(cold.policy_path, 1.0)
    return [some_examples(plain, seed) for seed in range(STEPS + 1)]


@pytest.fixture(scope="module")
def runs(cold, batches, tmp_path_factory: pytest.TempPathFactory) -> dict[Any, dict[str, Any]]:
    directory = tmp_path_factory.mktemp("supervised")
    found = {}
    for ranks in (1, 2):
        jobs = {"many": SupervisedJob(cold, batches[:1], batches[-1], 0.0, directory / f"{ranks}-many.pt")}
        if ranks == 2:
            whole = replace(cold, micro_batch_tokens=100_000)
            jobs["one"] = SupervisedJob(whole, batches[:1], batches[-1], 0.0, directory / "one.pt")
            for name, stop_at in (("whole", None), ("resumed", 2)):
                jobs[name] = SupervisedJob(cold, batches[:-1], batches[-1], 0.2, directory / f"{name}.pt", stop_at)
            lean = replace(cold, activation_checkpointing=True)
            jobs["lean"] = SupervisedJob(lean, batches[:-1], batches[-1], 0.2, directory / "lean.pt")
        run_ranks("tests.learners.zero3_supervised", list(jobs.values()), ranks, directory)
        found |= {(ranks, name): torch.load(job.output) for name, job in jobs.items()}
    return found


def plain_loss(policy: PlainPolicy, examples: list[Example]) -> tuple[torch.Tensor, dict[str, list[float]]]:
    """The loss by whole logits, and -log p of every choice by support."""
    grammar, terms, by_support = policy.family.grammar, [], {}
    for example in examples:
        ids = torch.from_numpy(np.concatenate([example.prompt, example.answer]).astype(np.int64))[None]
        logits = policy.model(input_ids=ids).logits[0, len(example.prompt) - 1 : -1]
        for row, token, kind in zip(logits, example.answer, grammar.supports(example.answer.tolist()), strict=True):
            if kind == Support.FORCED:
                continue
            allowed = torch.full_like(row, -torch.inf)
            allowed[torch.from_numpy(grammar.support_ids(Support(kind)))] = 0
            log_sum = (row + allowed).logsumexp(0)
            terms.append(log_sum - row[int(token)] + Z_LOSS * log_sum**2)
            by_support.setdefault(f"loss/{Support(kind).name.lower()}", []).append(float(log_sum - row[int(token)]))
    return torch.stack(terms).mean(), by_support


@pytest.mark.parametrize("key", [(1, "many"), (2, "many"), (2, "one")])
def test_gradient_update_and_losses_equal_plain_torch(runs, cold, batches, key) -> None:
    found = runs[key]
    oracle = Oracle(replace(cold, reference_path=cold.policy_path))
    start, model = snapshot(oracle.policy), oracle.policy.model
    loss, by_support = plain_loss(oracle.policy, batches[0])
    loss.backward()
    for name, parameter in model.named_parameters():
        difference = (found["gradient"][name] - parameter.grad).norm()
        assert difference <= 1e-5 * parameter.grad.norm(), f"{name}: {difference / parameter.grad.norm()}"
    metrics = found["metrics"][0]
    assert metrics["loss/total"] == pytest.approx(loss.item(), rel=1e-5)
    assert len(by_support) >= len(CHOICES) - 1
    for name, values in by_support.items():
        assert metrics[name] == pytest.approx(np.mean(values), rel=1e-5)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cold.max_grad_norm)
    assert metrics["learner/grad_norm"] == pytest.approx(float(norm), rel=1e-5)
    for group in oracle.optimizer.param_groups:
        group["lr"] = cold.learning_rate_at(1)
    oracle.optimizer.step()
    assert_same_update(found["weights"], snapshot(oracle.policy), start, atol=1e-6)
    with torch.no_grad():
        held_out, _ = plain_loss(oracle.policy, batches[-1])
    assert found["held_out"]["loss/total"] == pytest.approx(held_out.item(), rel=1e-4)


def test_a_run_that_stops_and_goes_on_is_the_undisturbed_one_to_the_bit(runs) -> None:
    """Dropout included."""
    whole, resumed = runs[2, "whole"], runs[2, "resumed"]
    clock = ("time/train", "throughput/tokens_per_s")
    for left, right in zip(whole["metrics"], resumed["metrics"], strict=True):
        assert {k: v for k, v in left.items() if k not in clock} == {k: v for k, v in right.items() if k not in clock}
    assert whole["held_out"] == resumed["held_out"]
    for name, tensor in whole["weights"].items():
        assert torch.equal(tensor, resumed["weights"][name]), name


def test_checkpointed_activations_drop_the_same_values_when_they_are_made_again(runs) -> None:
    """To the bit, with dropout: the published recipes have both."""
    for kind in ("gradient", "weights"):
        for name, tensor in runs[2, "whole"][kind].items():
            torch.testing.assert_close(runs[2, "lean"][kind][name], tensor, rtol=0, atol=0, msg=name)


def test_dropout_is_part_of_training(runs) -> None:
    """That it is off in the held-out loss follows from the test above: two splits would drop other values."""
    with_dropout, without = (runs[2, name]["metrics"][0] for name in ("whole", "many"))
    assert with_dropout["learner/learning_rate"] == without["learner/learning_rate"]
    assert with_dropout["loss/total"] != without["loss/total"]
