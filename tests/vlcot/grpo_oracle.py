"""GRPO from its definitions in plain loops, without torch: what the tensor code is compared with."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


def oracle_advantages(
    rewards: list[float], valid: list[bool], groups: list[int], std: str, eps: float, min_group: int
) -> tuple[list[float], list[bool]]:
    advantages, keep = [0.0] * len(rewards), [False] * len(rewards)
    for group in set(groups):
        members = [i for i in range(len(rewards)) if groups[i] == group and valid[i]]
        if len(members) < min_group:
            continue
        mean = math.fsum(rewards[i] for i in members) / len(members)
        squares = math.fsum((rewards[i] - mean) ** 2 for i in members)
        scale = {
            "unbiased": math.sqrt(squares / (len(members) - 1)) + eps,
            "population": math.sqrt(squares / len(members)) + eps,
            "none": 1.0,
        }[std]
        for i in members:
            advantages[i], keep[i] = (rewards[i] - mean) / scale, True
    return advantages, keep


@dataclass
class Sequence:
    """One sampled sequence: four log-probs per token, which tokens were sampled, and its advantage."""

    policy: np.ndarray
    old: np.ndarray
    behaviour: np.ndarray
    reference: np.ndarray
    sampled: np.ndarray
    advantage: float


def oracle_loss(
    sequences: list[Sequence],
    normalisation: str = "sequence",
    low: float = 0.2,
    high: float = 0.2,
    beta: float = 0.04,
    max_tokens: int | None = None,
    dual_clip: float | None = None,
    cap: float | None = None,
) -> tuple[float, list[float]]:
    """Loss of all sequences as one batch, and its derivative by every token's log-prob, token after token."""
    loss, gradient = 0.0, []
    all_tokens = sum(int(sequence.sampled.sum()) for sequence in sequences)
    for sequence in sequences:
        share = {
            "sequence": 1 / (len(sequences) * max(1, int(sequence.sampled.sum()))),
            "token": 1 / all_tokens,
            "dr_grpo": 1 / (len(sequences) * (max_tokens or 1)),
        }[normalisation]
        for t in range(len(sequence.policy)):
            if not sequence.sampled[t]:
                gradient.append(0.0)
                continue
            a, ratio = sequence.advantage, math.exp(sequence.policy[t] - sequence.old[t])
            value = min(ratio * a, min(max(ratio, 1 - low), 1 + high) * a)
            slope = 0.0 if (a > 0 and ratio > 1 + high) or (a < 0 and ratio < 1 - low) else ratio * a
            if dual_clip is not None and a < 0 and value < dual_clip * a:
                value, slope = dual_clip * a, 0.0
            weight = 1.0
            if cap is not None:
                weight = min(math.exp(sequence.old[t] - sequence.behaviour[t]), cap)
            d = sequence.reference[t] - sequence.policy[t]
            loss += share * (-weight * value + beta * (math.exp(d) - d - 1))
            gradient.append(share * (-weight * slope + beta * (1 - math.exp(d))))
    return loss, gradient


def random_sequences(lengths: list[int], seed: int, spread: float = 0.3) -> list[Sequence]:
    """Sequences whose four policies differ by about ``spread`` nats per token; four in five tokens were sampled."""
    rng = np.random.default_rng(seed)
    sequences = []
    for length in lengths:
        policy = -rng.exponential(2.0, length)
        old, behaviour, reference = (policy + rng.normal(0, spread, length) for _ in range(3))
        sampled = rng.random(length) < 0.8
        sampled[0] = True
        sequences.append(Sequence(policy, old, behaviour, reference, sampled, float(rng.normal())))
    return sequences


def packed(sequences: list[Sequence]) -> dict[str, Tensor]:
    """The arguments of `grpo_loss` for these sequences as one pack, in float64."""

    def column(name: str) -> Tensor:
        return torch.from_numpy(np.concatenate([getattr(sequence, name) for sequence in sequences]))

    lengths = [len(sequence.policy) for sequence in sequences]
    return {
        "logprobs": column("policy").requires_grad_(),
        "old_logprobs": column("old"),
        "behaviour_logprobs": column("behaviour"),
        "reference_logprobs": column("reference"),
        "token_mask": column("sampled"),
        "advantages": torch.tensor([sequence.advantage for sequence in sequences], dtype=torch.float64),
        "keep": torch.ones(len(sequences), dtype=torch.bool),
        "sequence_index": torch.arange(len(sequences)).repeat_interleave(torch.tensor(lengths)),
    }
