"""Advantages relative to the samples of one group."""

from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

StdConvention = Literal["unbiased", "population", "none"]


@dataclass(frozen=True)
class AdvantageConfig:
    """How rewards of a group become advantages: ``A = (r - mean) / (std + eps)``.

    std: ``unbiased`` divides the squared deviations by n - 1 (RealSR-R1's code, TRL, verl), ``population`` by n,
        ``none`` leaves the centred reward as it is (Dr. GRPO).
    eps: added to the standard deviation, in reward units; 1e-4 as in the authors' code. Unused with ``none``.
    min_group: groups with fewer valid samples are dropped. At least 2: a lone sample has no baseline.
    drop_zero_variance: drop groups whose valid rewards are all equal. When off they stay, with A = 0, and still add
        their KL term and their share of the denominators, as in the paper's eq. 1.
    """

    std: StdConvention = "unbiased"
    eps: float = 1e-4
    min_group: int = 2
    drop_zero_variance: bool = False

    def __post_init__(self) -> None:
        if self.std not in get_args(StdConvention):
            raise ValueError(f"advantage std {self.std!r} is unknown; allowed: {', '.join(get_args(StdConvention))}")
        if not 0 < self.eps < float("inf"):
            raise ValueError(f"advantage eps is {self.eps}; it must be a positive number")
        if self.min_group < 2:
            raise ValueError(
                f"advantage min_group is {self.min_group}; it must be at least 2, a lone sample has no baseline"
            )


class GroupCounts(NamedTuple):
    """What happened to the groups of one step, for the ``failures/*`` metrics."""

    groups: int
    too_small: int
    zero_variance: int
    failed_samples: int


class _Groups(NamedTuple):
    """Per-group figures [M] over valid samples, and each sample's row in them [N]."""

    row: Tensor
    size: Tensor
    mean: Tensor
    constant: Tensor
    too_small: Tensor


def group_advantages(
    rewards: Tensor, valid: Tensor, group_ids: Tensor, config: AdvantageConfig
) -> tuple[Tensor, Tensor]:
    """Advantage of each sample inside its group.

    rewards: float64 [N], total rewards. Where ``valid`` is False the value is never read, NaN included.
    valid: bool [N], False for a sample whose scoring failed.
    group_ids: int64 [N], any integers in any order; the only thing that makes two samples one group.

    Returns ``(advantages float32 [N], keep bool [N])`` in the order of the input. ``keep`` is False for failed samples
    and for all samples of a dropped group; their advantage is 0 and they belong in no loss and no denominator.
    Groups with equal rewards get exactly 0.

    Raises ValueError for wrong shapes or dtypes and for a valid reward that is not finite.
    """
    groups = _group(rewards, valid, group_ids, config)
    keep = valid & ~groups.too_small[groups.row]
    if config.drop_zero_variance:
        keep = keep & ~groups.constant[groups.row]

    # Rewards of one group may differ by 1e-5 only, so the mean is subtracted before anything is squared.
    centred = torch.where(keep, rewards - groups.mean[groups.row], 0.0)
    # A mean rounded in its last bit must not become an advantage.
    centred = centred.masked_fill(groups.constant[groups.row], 0.0)
    if config.std == "none":
        return centred.float(), keep
    squares = torch.zeros_like(groups.mean).index_add(0, groups.row, centred.square())
    degrees = groups.size - 1 if config.std == "unbiased" else groups.size
    std = (squares / degrees.clamp(min=1)).sqrt()
    return (centred / (std[groups.row] + config.eps)).float(), keep


def count_groups(rewards: Tensor, valid: Tensor, group_ids: Tensor, config: AdvantageConfig) -> GroupCounts:
    """Counts of the same inputs as `group_advantages`: groups, groups below ``min_group`` valid samples,
    groups of sufficient size without variance, failed samples."""
    groups = _group(rewards, valid, group_ids, config)
    return GroupCounts(
        groups=groups.size.numel(),
        too_small=int(groups.too_small.sum()),
        zero_variance=int((groups.constant & ~groups.too_small).sum()),
        failed_samples=int((~valid).sum()),
    )


def _group(rewards: Tensor, valid: Tensor, group_ids: Tensor, config: AdvantageConfig) -> _Groups:
    _check(rewards, valid, group_ids)
    ids, row = torch.unique(group_ids, return_inverse=True)
    usable = torch.where(valid, rewards, 0.0)
    zeros = torch.zeros(ids.numel(), dtype=rewards.dtype, device=rewards.device)
    size = zeros.long().index_add(0, row, valid.long())
    mean = zeros.index_add(0, row, usable) / size.clamp(min=1)
    highest = (zeros - torch.inf).scatter_reduce(0, row, rewards.masked_fill(~valid, -torch.inf), "amax")
    lowest = (zeros + torch.inf).scatter_reduce(0, row, rewards.masked_fill(~valid, torch.inf), "amin")
    return _Groups(row, size, mean, constant=highest <= lowest, too_small=size < config.min_group)


def _check(rewards: Tensor, valid: Tensor, group_ids: Tensor) -> None:
    wanted = (
        ("rewards", rewards, torch.float64),
        ("valid", valid, torch.bool),
        ("group_ids", group_ids, torch.int64),
    )
    for name, tensor, dtype in wanted:
        if tensor.dtype != dtype or tensor.shape != (rewards.numel(),):
            raise ValueError(
                f"{name} is {tensor.dtype} of shape {list(tensor.shape)}; it must be {dtype} of shape [N], here "
                f"[{rewards.numel()}]"
            )
    broken = valid & ~rewards.isfinite()
    if broken.any():
        raise ValueError(
            f"rewards of samples {broken.nonzero().flatten().tolist()[:8]} are not finite although marked valid; "
            "a failed score must come with valid = False"
        )
