"""Group relative policy optimisation as pure tensor functions: advantages, loss, KL estimators, corrections.

Definitions and options: docs/grpo.md.
"""

from vlcot.grpo.advantages import AdvantageConfig, GroupCounts, count_groups, group_advantages
from vlcot.grpo.corrections import LOG_RATIO_LIMIT, importance_ratio, truncated_importance_weights
from vlcot.grpo.kl import KL_ESTIMATORS, k1, k2, k3
from vlcot.grpo.loss import (
    Denominators,
    LossConfig,
    LossOutput,
    count_denominators,
    grpo_loss,
    packed_sequence_index,
)
from vlcot.grpo.stats import LossStats, finalise

__all__ = [
    "KL_ESTIMATORS",
    "LOG_RATIO_LIMIT",
    "AdvantageConfig",
    "Denominators",
    "GroupCounts",
    "LossConfig",
    "LossOutput",
    "LossStats",
    "count_denominators",
    "count_groups",
    "finalise",
    "group_advantages",
    "grpo_loss",
    "importance_ratio",
    "k1",
    "k2",
    "k3",
    "packed_sequence_index",
    "truncated_importance_weights",
]
