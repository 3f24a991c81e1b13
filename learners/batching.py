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

    @property
    def length(self) -> int:
        """Tokens of prompt and chain."""
        return len(self.prompt) + len(self.sample.ids)


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
    """Whole sequences, right-padded, for one forward pass; every tensor but ``advantages`` and ``keep`` is [B, L].

    Attributes:
        input_ids: int64.
        supports: uint8, FORCED in prompt and padding; a token counts in the loss where it is not FORCED.
        behaviour: float32, log-probs of the sampler.
        fresh: bool, loss tokens of samples wholly of the current version.
        advantages: float32 [B].
        keep: bool [B]; False in a micro-batch that only takes part in the collectives.
    """

    input_ids: torch.Tensor
    supports: torch.Tensor
    behaviour: torch.Tensor
    fresh: torch.Tensor
    advantages: torch.Tensor
    keep: torch.Tensor

    @property
    def token_mask(self) -> torch.Tensor:
        """bool [B, L], True where a token was a choice."""
        return self.supports != int(Support.FORCED)

    @property
    def sequence_index(self) -> torch.Tensor:
        """int64 [B * L], row of each token."""
        rows, columns = self.input_ids.shape
        return torch.arange(rows, device=self.input_ids.device).repeat_interleave(columns)

    def to(self, device: torch.device) -> MicroBatch:
        """The same on ``device``."""
        return MicroBatch(*(getattr(self, name).to(device) for name in self.__dataclass_fields__))


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


def plan_micro_batches(lengths: Sequence[int], ranks: int, budget: int) -> list[list[list[int]]]:
    """Rows of each micro-batch of each rank: ``plan[rank][micro_batch]``, equally many on every rank.

    Longest first to the rank with the fewest tokens, then packed by length so that rows times the longest
    stay within ``budget`` tokens. Ranks with fewer micro-batches get empty ones: each forward and backward of
    ZeRO-3 is collective, so every rank must run the same number.
    """
    order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    shares: list[list[int]] = [[] for _ in range(ranks)]
    loads = [0] * ranks
    for row in order:
        rank = loads.index(min(loads))
        shares[rank].append(row)
        loads[rank] += lengths[row]
    plan = [_pack(share, lengths, budget) for share in shares]
    most = max(len(batches) for batches in plan)
    return [batches + [[] for _ in range(most - len(batches))] for batches in plan]


def _pack(rows: list[int], lengths: Sequence[int], budget: int) -> list[list[int]]:
    """``rows`` come longest first, so the first of a micro-batch is its width."""
    batches: list[list[int]] = []
    for row in rows:
        if not batches or (len(batches[-1]) + 1) * lengths[batches[-1][0]] > budget:
            batches.append([])
        batches[-1].append(row)
    return batches


def collate(sequences: Sequence[TrainingSequence], pad: int) -> MicroBatch:
    """Right-pad ``sequences`` to one micro-batch; what is padding follows from lengths, never from ids."""
    shape = len(sequences), max(s.length for s in sequences)
    input_ids = np.full(shape, pad, dtype=np.int64)
    supports = np.zeros(shape, dtype=np.uint8)
    behaviour = np.zeros(shape, dtype=np.float32)
    fresh = np.zeros(shape, dtype=bool)
    for row, sequence in enumerate(sequences):
        start, end = len(sequence.prompt), sequence.length
        input_ids[row, :start] = sequence.prompt
        input_ids[row, start:end] = sequence.sample.ids
        supports[row, start:end] = sequence.sample.supports
        behaviour[row, start:end] = sequence.sample.logprobs
        fresh[row, start:end] = sequence.fresh & (sequence.sample.supports != int(Support.FORCED))
    return MicroBatch(
        torch.from_numpy(input_ids),
        torch.from_numpy(supports),
        torch.from_numpy(behaviour),
        torch.from_numpy(fresh),
        torch.tensor([s.advantage for s in sequences], dtype=torch.float32),
        torch.ones(len(sequences), dtype=torch.bool),
    )


def idle_micro_batch(text_id: int) -> MicroBatch:
    """A micro-batch that gives no loss but a (zero) gradient to every parameter, the head's included.

    Args:
        text_id: any id of the TEXT support.
    """
    return MicroBatch(
        input_ids=torch.full((1, 2), text_id, dtype=torch.int64),
        supports=torch.tensor([[int(Support.FORCED), int(Support.TEXT)]], dtype=torch.uint8),
        behaviour=torch.zeros(1, 2),
        fresh=torch.zeros(1, 2, dtype=torch.bool),
        advantages=torch.zeros(1),
        keep=torch.zeros(1, dtype=torch.bool),
    )
