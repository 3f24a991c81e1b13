"""ZeRO-3 in processes of its own against plain torch: the same gradient and weights under any split."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from learners.spec import LearnerSpec
from tests.learners.ranks import run_ranks
from tests.learners.synthetic import Oracle, PlainPolicy, assert_same_update, scored_groups, snapshot
from tests.learners.zero3_gradient import Job
from vlcot.grammar import Support
from vlcot.groups import Sample, ScoredGroup
from vlcot.policy.family import Family

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]
BUDGETS = {"many": 150, "one": 100_000}
"""Micro-batches of a few chains of one prompt, and one per length of the prompts."""
SPLITS = [(ranks, split) for ranks in (1, 2) for split in BUDGETS]


def off_policy(spec: LearnerSpec) -> LearnerSpec:
    """Two updates on a batch, with truncated importance sampling."""
    return replace(spec, epochs_per_batch=2, loss=replace(spec.loss, is_truncation=1.1))


def mismatched(groups: list[ScoredGroup]) -> list[ScoredGroup]:
    """Groups whose sampler was another model: log-probs off by a fifth."""
    rng = np.random.default_rng(3)

    def shifted(sample: Sample) -> Sample:
        noise = np.where(sample.supports == int(Support.FORCED), 0, rng.normal(0, 0.2, len(sample.ids)))
        return replace(sample, logprobs=(sample.logprobs + noise).astype(np.float32))

    return [
        replace(g, group=replace(g.group, samples=tuple(shifted(sample) for sample in g.group.samples))) for g in groups
    ]


@pytest.fixture(scope="module")
def groups(spec: LearnerSpec) -> list[ScoredGroup]:
    return scored_groups(PlainPolicy(spec.policy_path, spec.temperature), seed=1, invalid=1)


@pytest.fixture(scope="module")
def runs(
    spec: LearnerSpec, groups: list[ScoredGroup], tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[int, str], Any]:
    """Result of each (ranks, split)."""
    directory = tmp_path_factory.mktemp("zero3")
    found = {}
    for ranks in (1, 2):
        jobs = {
            split: Job(replace(spec, micro_batch_tokens=budget), groups, directory / f"{ranks}-{split}.pt")
            for split, budget in BUDGETS.items()
        }
        if ranks == 2:
            jobs["epochs"] = Job(off_policy(spec), mismatched(groups), directory / "epochs.pt")
            lean = replace(spec, activation_checkpointing=True, offload_reference=True)
            jobs["lean"] = Job(lean, groups, directory / "lean.pt")
        run_ranks("tests.learners.zero3_gradient", list(jobs.values()), ranks, directory)
        found |= {(ranks, split): torch.load(job.output) for split, job in jobs.items()}
    return found


@pytest.mark.parametrize("split", list(BUDGETS))
@pytest.mark.parametrize("ranks", [1, 2])
def test_gradient_and_update_equal_plain_torch(runs, spec, groups, ranks, split) -> None:
    """Pitfall 7: no trace of micro-batches, ranks or DeepSpeed's own divisions."""
    oracle = Oracle(spec)
    start = snapshot(oracle.policy)
    expected = oracle.gradient(groups)
    found = runs[ranks, split]
    assert found["gradient"].keys() == expected.keys()
    for name, gradient in expected.items():
        difference = (found["gradient"][name] - gradient).norm()
        assert difference <= 1e-5 * gradient.norm(), f"{name}: {difference / gradient.norm()}"
    norm = oracle.step(groups, 1)
    assert found["metrics"]["grpo/grad_norm"] == pytest.approx(norm, rel=1e-5)
    assert norm > spec.max_grad_norm, "the test must clip"
    assert_same_update(found["weights"], snapshot(oracle.policy), start, atol=1e-6)


def test_every_split_moves_the_weights_alike(runs, spec: LearnerSpec) -> None:
    """1 rank or 2, one micro-batch or many: the same weights to 1e-6."""
    start = snapshot(PlainPolicy(spec.policy_path, spec.temperature))
    for key in SPLITS:
        assert_same_update(runs[key]["weights"], runs[1, "one"]["weights"], start, atol=1e-6)


def test_second_epoch_with_truncated_importance_sampling_equals_plain_torch(runs, spec, groups) -> None:
    """The ratio is anchored on the weights at the start of the step, the sampler's log-probs enter the weights only."""
    oracle, shifted = Oracle(off_policy(spec)), mismatched(groups)
    anchors = oracle.anchors(shifted)
    norms = [oracle.step(shifted, 1, anchors)]
    expected = oracle.gradient(shifted, anchors)
    norms.append(float(torch.stack([g.norm() for g in expected.values()]).norm()))
    found = runs[2, "epochs"]
    assert found["metrics"]["grpo/grad_norm"] == pytest.approx(np.mean(norms), rel=1e-4)
    plain = Oracle(spec).gradient(shifted)
    for name, gradient in expected.items():
        difference = (found["gradient"][name] - gradient).norm()
        assert difference <= 1e-3 * gradient.norm(), f"{name}: {difference / gradient.norm()}"
        assert (plain[name] - gradient).norm() > 1e-2 * gradient.norm(), name


def test_checkpointed_activations_and_an_offloaded_reference_change_nothing(runs) -> None:
    """To the bit: the same arithmetic is done again."""
    for kind in ("gradient", "weights"):
        for name, tensor in runs[2, "lean"][kind].items():
            torch.testing.assert_close(tensor, runs[2, "many"][kind][name], rtol=0, atol=0, msg=name)


def test_fresh_samples_have_ratio_one(runs) -> None:
    """Pitfalls 10 and 22: sampler and learner agree, so nothing is clipped."""
    for key in SPLITS:
        metrics = runs[key]["metrics"]
        assert metrics["mismatch/max"] < 1e-5
        assert metrics["grpo/ratio_mean"] == pytest.approx(1, abs=1e-6)
        assert metrics["grpo/clip_fraction"] == 0


def test_forced_tokens_have_no_gradient(runs, spec: LearnerSpec) -> None:
    """The head's rows of ids that are always forced stay untouched."""
    vocabulary = Family.from_pretrained(spec.policy_path).vocabulary
    gradient = runs[2, "many"]["gradient"]["lm_head.weight"]
    forced = [vocabulary.new_line, vocabulary.image_end, *vocabulary.grid_ids.values()]
    assert not gradient[forced].any()
    assert gradient[vocabulary.image_ids].any()
