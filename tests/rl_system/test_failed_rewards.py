"""No failed score reaches the policy: from a server that dies, hangs or answers nonsense through to the gradient."""

from __future__ import annotations

import asyncio
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from learners.batching import build_batch, collate
from learners.spec import LearnerSpec
from reward_servers.client import RewardClient
from reward_servers.contract import DetectedObject, Detection, Judgement, RewardServerError
from reward_servers.policies import MinViableGroup, RetryThenDrop, Verdict, failure_reasons
from reward_servers.retry import RetryPolicy
from rl_system.coordination.experts import VisualExpert
from rl_system.coordination.objects import DetectedObjects
from rl_system.coordination.scoring import Scorer
from tests.families import random_policy
from tests.learners.synthetic import PlainPolicy, scored_groups
from tests.rl_system.runs.synthetic import chain
from vlcot.groups import Group, ScoredGroup
from vlcot.grpo import LossConfig, grpo_loss
from vlcot.policy.logprobs import SupportTable
from vlcot.rewards import ExpertWeights, RewardWeights

pytestmark = pytest.mark.unit

TRUTH = (
    "[medium blur, heavy downscale, light gaussian noise, heavy compression; "
    "no blur, upscale, medium poisson noise, light compression]"
)
SAID = (TRUTH, "[medium blur, heavy downscale]", "[light blur]", TRUTH)
CAT = Detection((DetectedObject("cat", 0.9, (0.0, 0.0, 4.0, 4.0), 0.5),), ("cat",))
BAD_ANSWERS = {
    "dies": ConnectionError("the replica died"),
    "hangs": asyncio.sleep,
    "garbage": "10/10, very nice",
    "NaN": [Judgement(math.nan, 5.0, 5.0)],
    "too many": [Judgement(9.0, 9.0, 9.0)] * 2,
    "out of range": [Judgement(1e6, 5.0, 5.0)],
    "own error": RewardServerError("no usable answer"),
}


class Servers:
    """Grounded-SAM works; the visual expert answers as it is told to."""

    def __init__(self, answer):
        self.answer = answer

    async def call(self, server, method, arguments):
        if method == "objects":
            return CAT
        if self.answer is asyncio.sleep:
            await asyncio.sleep(60)
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


@pytest.fixture(scope="module")
def policy(tmp_path_factory) -> PlainPolicy:
    path = tmp_path_factory.mktemp("failed_rewards") / "policy"
    random_policy(path, seed=0)
    return PlainPolicy(path, 0.9)


@pytest.fixture(scope="module")
def group(policy) -> Group:
    """Four chains; the last one alone has a final image, so that the expert's failure is its failure alone."""
    made = scored_groups(policy, seed=4, groups=1)[0].group
    final = np.full((8, 8, 3), 90, np.uint8)
    samples = [
        replace(sample, chain=chain((said, "a cat", None, None), ("incomplete",)), images=(None, None, None))
        for sample, said in zip(made.samples, SAID, strict=True)
    ]
    samples[3] = replace(samples[3], images=(None, None, final))
    return replace(made, samples=tuple(samples), prompt=replace(made.prompt, degradation=TRUTH))


def scored(group: Group, answer: object) -> ScoredGroup:
    async def score() -> ScoredGroup:
        client = RewardClient(
            Servers(answer),
            timeout_s=0.2 if answer is asyncio.sleep else 5.0,
            retry=RetryPolicy(attempts=2, base_delay_s=0.0),
        )
        expert = VisualExpert(client, ExpertWeights())
        scorer = Scorer(RewardWeights(), DetectedObjects(client), expert, {}, client.left_alone)
        return await scorer.score(group, scorer.find_objects(group.prompt))

    return asyncio.run(score())


def gradient(policy: PlainPolicy, group: ScoredGroup) -> dict[str, torch.Tensor]:
    """Of the learner's loss on the learner's batch, by parameter name."""
    spec = LearnerSpec(
        policy_path="unused",
        reference_path=None,
        steps=1,
        groups_per_step=1,
        temperature=0.9,
        max_staleness=1,
        learning_rate=1e-5,
        micro_batch_tokens=100_000,
        loss=LossConfig(kl_beta=0.0),
    )
    batch = build_batch([group], 0, spec)
    micro = collate([batch.sequences], policy.family.vocabulary.pad)
    policy.model.zero_grad()
    table = SupportTable.of(policy.family.grammar)
    logprobs = policy.model.chain_logprobs(
        micro.prompt_ids, micro.chain_ids, micro.supports, micro.counts, table, spec.temperature
    )
    grpo_loss(
        logprobs.flatten(),
        old_logprobs=micro.behaviour.flatten(),
        behaviour_logprobs=micro.behaviour.flatten(),
        reference_logprobs=None,
        advantages=micro.advantages,
        keep=micro.keep,
        token_mask=micro.token_mask.flatten(),
        sequence_index=micro.sequence_index,
        config=spec.loss,
        denominators=batch.denominators,
    ).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in policy.model.named_parameters()}


def without(group: ScoredGroup, index: int) -> ScoredGroup:
    """The same group, had sample ``index`` never been sampled."""
    kept = [i for i in range(len(group.valid)) if i != index]
    samples = tuple(group.group.samples[i] for i in kept)
    scores = tuple(group.scores[i] for i in kept)
    return replace(
        group,
        group=replace(group.group, samples=samples),
        scores=scores,
        totals=group.totals[kept],
        valid=group.valid[kept],
    )


@pytest.mark.parametrize("answer", BAD_ANSWERS.values(), ids=BAD_ANSWERS)
def test_a_failed_score_changes_no_advantage_and_no_gradient(policy, group, answer):
    failed = scored(group, answer)
    assert failed.valid.tolist() == [True, True, True, False] and math.isnan(failed.totals[3])
    assert MinViableGroup(0.75).verdict(failed, 1) is Verdict.TRAIN
    found, expected = gradient(policy, failed), gradient(policy, without(failed, 3))
    for name, wanted in expected.items():
        torch.testing.assert_close(found[name], wanted, rtol=1e-5, atol=1e-8)
    assert max(g.abs().max() for g in expected.values()) > 1e-4


def test_the_same_sample_with_its_score_does_change_the_gradient(policy, group):
    """Or else the test above could not fail."""
    whole = scored(group, [Judgement(9.0, 9.0, 9.0)])
    assert whole.valid.all()
    with_it, without_it = gradient(policy, whole), gradient(policy, without(whole, 3))
    assert max((with_it[name] - without_it[name]).abs().max() for name in with_it) > 1e-4


def test_a_policy_that_tolerates_none_drops_the_group_and_says_why(group):
    failed = scored(group, ConnectionError("the replica died"))
    assert [RetryThenDrop(1).verdict(failed, n) for n in (1, 2)] == [Verdict.SCORE_AGAIN, Verdict.DROP]
    assert failure_reasons(failed) == (
        "1 of 4 samples have no reward: generation: qwen_vl failed 2 times; last: ConnectionError: the replica died (1)"
    )
