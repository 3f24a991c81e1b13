"""From scored groups to micro-batches: who is trained on, with which advantage, on which rank.

All of it is a pure function of the step's groups, so that every rank computes the same plan without talking.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from learners.spec import LearnerSpec
from vlcot.grammar import Support
from vlcot.groups import Sample, ScoredGroup
from vlcot.grpo import Denominators, count_groups, group_advantages


@dataclass(frozen=True, eq=False)
class TrainingSequence:
    """One sample to train on: its prompt, chain and advantage.

    Attributes:
        group: row of its group in the step.
        fresh: every token was sampled by the weights that are trained now.
    """

    prompt: np.ndarray
    sample: Sample
    advantage: float
    group: int
    fresh: bool


@dataclass(frozen=True, eq=False)
class StepBatch:
    """What one step trains on.

    Attributes:
        sequences: in the order of groups and samples.
        denominators: of the loss, over all ranks and micro-batches.
        metrics: ``staleness/*``, ``failures/*`` and ``batch/*`` of the step.
    """

    sequences: tuple[TrainingSequence, ...]
    denominators: Denominators
    metrics: dict[str, float]


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """Prompts, and under each some of its chains, for one forward pass: N prompts of P tokens, B chains of S.

    Attributes:
        counts: chains of each prompt, in the order of the chains; N numbers.
        prompt_ids: int64 [N, P].
        chain_ids: int64 [B, S], right-padded.
        supports: uint8 [B, S], FORCED in padding; a token counts in the loss where it is not FORCED.
        behaviour: float32 [B, S], log-probs of the sampler.
        fresh: bool [B, S], loss tokens of samples wholly of the current version.
        advantages: float32 [B].
        keep: bool [B]; False in a micro-batch that only takes part in the collectives.
    """

    counts: tuple[int, ...]
    prompt_ids: torch.Tensor
    chain_ids: torch.Tensor
    supports: torch.Tensor
    behaviour: torch.Tensor
    fresh: torch.Tensor
    advantages: torch.Tensor
    keep: torch.Tensor

    @property
    def token_mask(self) -> torch.Tensor:
        """bool [B, S], True where a token was a choice."""
        return self.supports != int(Support.FORCED)

    @property
    def sequence_index(self) -> torch.Tensor:
        """int64 [B * S], row of each token."""
        rows, width = self.chain_ids.shape
        return torch.arange(rows, device=self.chain_ids.device).repeat_interleave(width)

    def to(self, device: torch.device) -> MicroBatch:
        """The same on ``device``."""
        counts, *tensors = (getattr(self, name) for name in self.__dataclass_fields__)
        return MicroBatch(counts, *(tensor.to(device) for tensor in tensors))


def build_batch(groups: Sequence[ScoredGroup], version: int, spec: LearnerSpec) -> StepBatch:
    """Advantages inside each group, samples that cannot be trained on left out and counted.

    Args:
        groups: of one step.
        version: of the weights that this step trains.

    Raises:
        ValueError: no or too many groups, a group id twice, a sample whose arrays do not fit, or weights of
            the future or older than ``spec.max_staleness`` versions among a trained sample's.
    """
    if not 1 <= len(groups) <= spec.groups_per_step:
        raise ValueError(f"a step takes 1 to {spec.groups_per_step} groups, it was given {len(groups)}")
    doubled = [name for name, n in Counter(g.group.prompt.group_id for g in groups).items() if n > 1]
    if doubled:
        raise ValueError(f"group {doubled[0]} stands twice in one step")
    for group in groups:
        _check_group(group)
    rewards = torch.from_numpy(np.concatenate([g.totals for g in groups]).astype(np.float64))
    valid = torch.from_numpy(np.concatenate([g.valid for g in groups]).astype(bool))
    rows = torch.arange(len(groups)).repeat_interleave(torch.tensor([len(g.totals) for g in groups]))
    advantages, keep = group_advantages(rewards, valid, rows, spec.advantage)
    samples = [(group, sample) for group in groups for sample in group.group.samples]
    sequences = tuple(
        TrainingSequence(
            prompt=group.group.prompt.ids,
            sample=sample,
            advantage=float(advantages[i]),
            group=int(rows[i]),
            fresh=all(span.version == version for span in sample.versions),
        )
        for i, (group, sample) in enumerate(samples)
        if keep[i]
    )
    counts = count_groups(rewards, valid, rows, spec.advantage)
    metrics = {
        "batch/groups": float(counts.groups),
        "batch/samples": float(len(sequences)),
        "batch/zero_variance_groups": float(counts.zero_variance),
        "failures/samples_failed": float(counts.failed_samples),
        "failures/samples_dropped": float(len(samples) - len(sequences)),
        "failures/groups_too_small": float(counts.too_small),
        **_staleness([s.sample for s in sequences], version, spec.max_staleness),
    }
    tokens = sum(int(np.count_nonzero(s.sample.supports)) for s in sequences)
    return StepBatch(sequences, Denominators(len(sequences), tokens), metrics)


def _check_group(group: ScoredGroup) -> None:
    name = group.group.prompt.group_id
    if not len(group.totals) == len(group.valid) == len(group.group.samples):
        raise ValueError(f"group {name} has {len(group.group.samples)} samples but {len(group.totals)} totals")
    for index, sample in enumerate(group.group.samples):
        if not len(sample.ids) == len(sample.logprobs) == len(sample.supports) or not len(sample.ids):
            raise ValueError(
                f"group {name}, sample {index}: {len(sample.ids)} ids, {len(sample.logprobs)} log-probs and "
                f"{len(sample.supports)} supports; they must be equally many and at least 1"
            )
        ends = [span.end for span in sample.versions]
        if [span.start for span in sample.versions] != [0, *ends[:-1]] or ends[-1:] != [len(sample.ids)]:
            raise ValueError(f"group {name}, sample {index}: version spans do not cover its {len(sample.ids)} ids")


def _staleness(samples: Sequence[Sample], version: int, bound: int) -> dict[str, float]:
    if not samples:
        return {}
    lags = [version - sample.oldest_version for sample in samples]
    newest = max(span.version for sample in samples for span in sample.versions)
    if max(lags) > bound:
        raise ValueError(f"a sample is {max(lags)} versions older than weights {version}; at most {bound} is allowed")
    if newest > version:
        raise ValueError(f"a sample was made by weights {newest}, but the learner is only at {version}")
    return {"staleness/mean": float(np.mean(lags)), "staleness/max": float(max(lags))}


@dataclass(frozen=True)
class Share:
    """Chains of one group that are computed together, under one prompt.

    Attributes:
        rows: of the step's sequences.
        prompt: tokens of the prompt.
        width: tokens of the longest chain.
    """

    rows: tuple[int, ...]
    prompt: int
    width: int

    @property
    def tokens(self) -> int:
        """Computed for it, padding included."""
        return self.prompt + len(self.rows) * self.width


def plan_micro_batches(sequences: Sequence[TrainingSequence], ranks: int, budget: int) -> list[list[tuple[Share, ...]]]:
    """Shares of each micro-batch of each rank: ``plan[rank][micro_batch]``, equally many on every rank.

    A group stays whole, so that its prompt is computed once, unless it exceeds ``budget`` tokens or there are fewer
    groups than ranks. Largest share first to the rank with the fewest tokens; shares with prompts of one length go
    together while prompts, and chains times the longest, stay within ``budget``. Ranks with fewer micro-batches get
    empty ones: each forward and backward of ZeRO-3 is collective, so every rank must run the same number.
    """
    groups: dict[int, list[int]] = {}
    for row, sequence in enumerate(sequences):
        groups.setdefault(sequence.group, []).append(row)
    least = -(-ranks // max(1, len(groups)))
    shares = [share for rows in groups.values() for share in _shares(rows, sequences, budget, least)]
    shares.sort(key=lambda share: (-share.tokens, share.rows))
    of_ranks: list[list[Share]] = [[] for _ in range(ranks)]
    loads = [0] * ranks
    for share in shares:
        rank = loads.index(min(loads))
        of_ranks[rank].append(share)
        loads[rank] += share.tokens
    plan = [_pack(of_rank, budget) for of_rank in of_ranks]
    most = max(len(batches) for batches in plan)
    return [batches + [()] * (most - len(batches)) for batches in plan]


def _shares(rows: list[int], sequences: Sequence[TrainingSequence], budget: int, least: int) -> list[Share]:
    """One group in as few shares as the budget allows, at least ``least`` where it has so many chains."""
    lengths = {row: len(sequences[row].sample.ids) for row in rows}
    rows = sorted(rows, key=lambda row: -lengths[row])
    prompt = len(sequences[rows[0]].prompt)
    for number in range(min(least, len(rows)), len(rows) + 1):
        cuts = [tuple(int(row) for row in part) for part in np.array_split(rows, number)]
        shares = [Share(part, prompt, lengths[part[0]]) for part in cuts]
        if all(share.tokens <= budget for share in shares):
            break
    return shares


def _pack(shares: list[Share], budget: int) -> list[tuple[Share, ...]]:
    """``shares`` in micro-batches; those with more tokens than the budget are alone."""
    batches: list[list[Share]] = []
    for share in sorted(shares, key=lambda share: (-share.prompt, -share.width)):
        if batches and share.prompt == batches[-1][0].prompt and _padded([*batches[-1], share]) <= budget:
            batches[-1].append(share)
        else:
            batches.append([share])
    return [tuple(batch) for batch in batches]


def _padded(shares: Sequence[Share]) -> int:
    """Tokens of a micro-batch of ``shares``, padding included."""
    chains = sum(len(share.rows) for share in shares)
    return sum(share.prompt for share in shares) + chains * max(share.width for share in shares)


def collate(shares: Sequence[Sequence[TrainingSequence]], pad: int) -> MicroBatch:
    """Chains of one prompt each in ``shares``; prompts have one length. Right-pads the chains.

    What is padding follows from lengths, never from ids.
    """
    sequences = [sequence for share in shares for sequence in share]
    shape = len(sequences), max(len(s.sample.ids) for s in sequences)
    chain_ids = np.full(shape, pad, dtype=np.int64)
    supports = np.zeros(shape, dtype=np.uint8)
    behaviour = np.zeros(shape, dtype=np.float32)
    fresh = np.zeros(shape, dtype=bool)
    for row, sequence in enumerate(sequences):
        sample, end = sequence.sample, len(sequence.sample.ids)
        chain_ids[row, :end] = sample.ids
        supports[row, :end] = sample.supports
        behaviour[row, :end] = sample.logprobs
        fresh[row, :end] = sequence.fresh & (sample.supports != int(Support.FORCED))
    return MicroBatch(
        counts=tuple(len(share) for share in shares),
        prompt_ids=torch.from_numpy(np.stack([share[0].prompt for share in shares]).astype(np.int64)),
        chain_ids=torch.from_numpy(chain_ids),
        supports=torch.from_numpy(supports),
        behaviour=torch.from_numpy(behaviour),
        fresh=torch.from_numpy(fresh),
        advantages=torch.tensor([s.advantage for s in sequences], dtype=torch.float32),
        keep=torch.ones(len(sequences), dtype=torch.bool),
    )


def idle_micro_batch(text_id: int) -> MicroBatch:
    """A micro-batch that gives no loss but a (zero) gradient to every parameter, the head's included.

    Args:
        text_id: any id of the TEXT support.
    """
    return MicroBatch(
        counts=(1,),
        prompt_ids=torch.full((1, 1), text_id, dtype=torch.int64),
        chain_ids=torch.full((1, 1), text_id, dtype=torch.int64),
        supports=torch.tensor([[int(Support.TEXT)]], dtype=torch.uint8),
        behaviour=torch.zeros(1, 1),
        fresh=torch.zeros(1, 1, dtype=torch.bool),
        advantages=torch.zeros(1),
        keep=torch.zeros(1, dtype=torch.bool),
    )
