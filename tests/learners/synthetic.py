"""Scored groups with real log-probs of a small policy, and a plain-torch GRPO step on them as the oracle."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from learners.engine import ADAM_EPS
from learners.spec import LearnerSpec
from vlcot.grammar import ChainState, Grammar, Support
from vlcot.groups import Group, Prompt, Sample, Scored, ScoredGroup, VersionSpan
from vlcot.grpo import group_advantages
from vlcot.policy.family import Family
from vlcot.policy.logprobs import SupportTable
from vlcot.policy.model import VlcotForCausalLM

PROMPT_LENGTHS = (9, 14, 21)


def random_chain(grammar: Grammar, length: int, seed: int) -> np.ndarray:
    """int32 [length]: text, then the coarse image, then text; every id is allowed where it stands."""
    rng = np.random.default_rng(seed)
    state = ChainState(grammar)
    ids: list[int] = []
    text = grammar.vocabulary.text_ids
    while len(ids) < length:
        support, forced = state.next()
        if support is Support.FORCED:
            token = forced
        elif support is Support.CODE:
            token = int(rng.choice(grammar.vocabulary.image_ids))
        elif len(ids) == 5 and state.images == 0:
            token = grammar.vocabulary.image_start
        else:
            token = int(rng.choice(text))
        ids.append(token)
        state.advance(token)
    return np.array(ids, dtype=np.int32)


class PlainPolicy:
    """The policy in one process, without DeepSpeed."""

    def __init__(self, path: Path | str, temperature: float) -> None:
        self.family = Family.from_pretrained(path)
        self.model = VlcotForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="sdpa")
        self._table = SupportTable.of(self.family.grammar)
        self._temperature = temperature

    def logprobs(self, prompt: np.ndarray, ids: np.ndarray, supports: np.ndarray) -> torch.Tensor:
        """float32 [len(ids)], one unpadded sequence at a time."""
        sequence = torch.from_numpy(np.concatenate([prompt, ids]).astype(np.int64))[None]
        kinds = torch.from_numpy(np.concatenate([np.zeros(len(prompt), np.uint8), supports]))[None]
        return self.model.token_logprobs(sequence, self._table, kinds, self._temperature)[0, len(prompt) :]


def scored_groups(
    policy: PlainPolicy, seed: int, groups: int = 3, size: int = 4, version: int = 0, invalid: int = 0
) -> list[ScoredGroup]:
    """Groups of chains of uneven lengths whose behaviour log-probs are the policy's own.

    The first ``invalid`` samples of the first group have failed scores.
    """
    made = []
    for g in range(groups):
        rng = np.random.default_rng(1000 * seed + g)
        prompt = rng.choice(policy.family.vocabulary.text_ids, PROMPT_LENGTHS[g % 3]).astype(np.int32)
        samples = []
        for _ in range(size):
            ids = random_chain(policy.family.grammar, int(rng.integers(20, 48)), seed=int(rng.integers(1 << 30)))
            samples.append(_sample(policy, prompt, ids, version))
        failed = invalid if g == 0 else 0
        totals = np.where(np.arange(size) < failed, np.nan, rng.random(size))
        made.append(
            ScoredGroup(
                group=Group(_prompt(f"{seed}-{g}", prompt), tuple(samples), 0.1, "test"),
                scores=tuple({"format": Scored(0.5)} for _ in range(size)),
                totals=totals,
                valid=~np.isnan(totals),
                objects=(),
                reward_s={},
            )
        )
    return made


def _prompt(group_id: str, ids: np.ndarray) -> Prompt:
    return Prompt(group_id, 0, 0, ids, np.zeros((4, 4, 3), dtype=np.uint8), "blur: low")


def _sample(policy: PlainPolicy, prompt: np.ndarray, ids: np.ndarray, version: int) -> Sample:
    supports = policy.family.grammar.supports(ids.tolist())
    with torch.no_grad():
        logprobs = policy.logprobs(prompt, ids, supports).numpy()
    return Sample(
        ids=ids,
        logprobs=logprobs,
        supports=supports,
        versions=(VersionSpan(version, 0, len(ids)),),
        finish_reason="length",
        chain=policy.family.builder.parse(ids.tolist()),
        images=(None, None, None),
    )


def with_samples(group: ScoredGroup, **changes: object) -> ScoredGroup:
    """``group`` with ``changes`` made to each sample."""
    samples = tuple(replace(sample, **changes) for sample in group.group.samples)
    return replace(group, group=replace(group.group, samples=samples))


Anchors = list[list[torch.Tensor]]
"""Log-probs of the sampled tokens, by group and sample."""


class Oracle:
    """GRPO with torch's AdamW: sequence by sequence, eq. 1 written out, one backward for the whole batch."""

    def __init__(self, spec: LearnerSpec) -> None:
        self.spec = spec
        self.policy = PlainPolicy(spec.policy_path, spec.temperature)
        self.reference = PlainPolicy(spec.reference_path, spec.temperature)
        named = list(self.policy.model.named_parameters())
        plain = [p for name, p in named if "norm" in name]
        decayed = [p for name, p in named if "norm" not in name]
        self.optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": spec.weight_decay}, {"params": plain, "weight_decay": 0.0}],
            lr=spec.learning_rate,
            betas=spec.betas,
            eps=ADAM_EPS,
        )

    def gradient(self, groups: list[ScoredGroup], anchors: Anchors | None = None) -> dict[str, torch.Tensor]:
        """Gradient of the step's loss before clipping, by parameter name."""
        self.optimizer.zero_grad()
        self.loss(groups, anchors).backward()
        return {name: p.grad.clone() for name, p in self.policy.model.named_parameters()}

    def anchors(self, groups: list[ScoredGroup]) -> Anchors:
        """The policy's own log-probs of all sampled tokens, now."""
        with torch.no_grad():
            return [[self._logprobs(self.policy, group, sample) for sample in group.group.samples] for group in groups]

    def loss(self, groups: list[ScoredGroup], anchors: Anchors | None = None) -> torch.Tensor:
        """Scalar: mean over kept sequences of the mean over their sampled tokens.

        With ``anchors``, they are pi_old and the sampler's log-probs enter the truncated importance weights.
        """
        config = self.spec.loss
        losses = []
        for g, group in enumerate(groups):
            rows = torch.zeros(len(group.totals), dtype=torch.int64)
            totals, valid = torch.from_numpy(group.totals), torch.from_numpy(group.valid)
            advantages, keep = group_advantages(totals, valid, rows, self.spec.advantage)
            for i, sample in enumerate(group.group.samples):
                if not keep[i]:
                    continue
                logprobs = self._logprobs(self.policy, group, sample)
                with torch.no_grad():
                    reference = self._logprobs(self.reference, group, sample)
                behaviour = torch.from_numpy(sample.logprobs)[sample.supports != int(Support.FORCED)]
                old = behaviour if anchors is None else anchors[g][i]
                weight = 1 if anchors is None else (old - behaviour).exp().clamp(max=config.is_truncation)
                ratio = (logprobs - old).exp()
                clipped = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
                surrogate = weight * torch.minimum(ratio * advantages[i], clipped * advantages[i])
                kl = (reference - logprobs).exp() - (reference - logprobs) - 1
                losses.append((-surrogate + config.kl_beta * kl).mean())
        return torch.stack(losses).mean()

    def step(self, groups: list[ScoredGroup], step: int, anchors: Anchors | None = None) -> float:
        """One update; returns the gradient norm before clipping."""
        self.gradient(groups, anchors)
        norm = torch.nn.utils.clip_grad_norm_(self.policy.model.parameters(), self.spec.max_grad_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = self.spec.learning_rate_at(step)
        self.optimizer.step()
        return float(norm)

    @staticmethod
    def _logprobs(policy: PlainPolicy, group: ScoredGroup, sample: Sample) -> torch.Tensor:
        chosen = torch.from_numpy(sample.supports != int(Support.FORCED))
        return policy.logprobs(group.group.prompt.ids, sample.ids, sample.supports)[chosen]


Weights = dict[str, torch.Tensor]


def snapshot(policy: PlainPolicy) -> Weights:
    """A copy of the weights by name."""
    return {name: p.detach().clone() for name, p in policy.model.named_parameters()}


def assert_same_update(found: Weights, expected: Weights, start: Weights, atol: float) -> None:
    """``found`` is as far from ``start``, and in the same direction, as ``expected``: to 0.1 % and ``atol``.

    One weight in a thousand may differ: AdamW's first updates are lr * sign(gradient), also where the gradient is
    rounding noise.
    """
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        difference = (found[name] - weight).abs().flatten().sort().values
        difference = difference[: -(1 + len(difference) // 1000)]
        moved = (weight - start[name]).norm()
        assert difference[-1] <= atol, f"{name}: {difference[-1]}"
        assert moved > 0 and difference.norm() <= 1e-3 * moved, f"{name}: {difference.norm() / moved}"
