"""Every metric of a run: name, unit, meaning. The table of ``docs/metrics.md`` is made from this one.

python -m rl_system.runs.metric_names       prints the table
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

PREFIX = "rl_"
"""Of our names at the Prometheus endpoint; Ray puts ``ray_`` before it."""


@dataclass(frozen=True)
class Metric:
    """One metric.

    Attributes:
        name: in ``metrics.jsonl``, TensorBoard and the other sinks.
        unit: empty for a number without one.
        meaning: one sentence.
        absent: when a step has none; empty: never.
    """

    name: str
    unit: str
    meaning: str
    absent: str = ""


GRPO = (
    Metric("reward/total", "", "mean total reward of the samples that have one", "every sample of the step failed"),
    Metric("reward/format", "0..1", "mean format reward", "no sample has it"),
    Metric("reward/degradation", "0..1", "mean degradation reward", "no sample has it"),
    Metric("reward/understanding", "0..1", "mean understanding reward", "no image of the step has a main object"),
    Metric("reward/generation", "0..1", "mean generation reward", "no sample has it"),
    Metric("grpo/loss", "", "loss of the step", "the step was skipped"),
    Metric("grpo/kl", "nats", "KL to the frozen reference, mean over loss tokens", "`grpo.kl_beta=0`"),
    Metric("grpo/clip_fraction", "0..1", "loss tokens whose gradient the clip removed", "the step was skipped"),
    Metric("grpo/ratio_mean", "", "mean importance ratio", "the step was skipped"),
    Metric("grpo/log_ratio_mean", "nats", "its logarithm, mean over loss tokens", "the step was skipped"),
    Metric("grpo/log_ratio_abs_max", "nats", "largest absolute log-ratio", "the step was skipped"),
    Metric("grpo/sampler_kl", "nats", "KL of sampler and learner, estimator k3", "the step was skipped"),
    Metric("grpo/sampler_log_ratio_abs_max", "nats", "largest difference of both log-probs", "the step was skipped"),
    Metric("grpo/is_weight_mean", "", "mean truncated importance weight; 1 when off", "the step was skipped"),
    Metric("grpo/is_truncated_fraction", "0..1", "weights that were truncated", "the step was skipped"),
    Metric("grpo/entropy", "nats", "mean -log-prob of the sampled choices, an estimator", "the step was skipped"),
    Metric("grpo/grad_norm", "", "gradient norm before clipping", "the step was skipped"),
    Metric("grpo/learning_rate", "", "learning rate of the step", "the step was skipped"),
    Metric("mismatch/mean", "nats", "difference of the log-probs at equal weights, mean", "no sample is fresh"),
    Metric("mismatch/max", "nats", "the same, largest", "no sample is fresh"),
    Metric("staleness/mean", "versions", "age of the trained samples' oldest token, mean", "no sample was trained"),
    Metric("staleness/max", "versions", "the same, largest", "no sample was trained"),
    Metric("batch/groups", "", "groups that the step trained on"),
    Metric("batch/samples", "", "samples that the step trained on"),
    Metric("batch/zero_variance_groups", "", "groups whose samples all have the same total"),
    Metric("groups/reused", "", "groups of the step that an attempt before a resume had made"),
    *(
        Metric(f"groups/refused_{reason}", "", f"such groups that could not be used: {why}", "there was none")
        for reason, why in {
            "unreadable": "the file is broken",
            "other_prompt": "the image is another one now",
            "lost_weights": "written by weights that the checkpoint does not have",
            "too_old": "written by weights that are too old for its step",
        }.items()
    ),
    Metric("failures/rate", "0..1", "share of the rewards asked for since the step before that failed"),
    Metric("failures/format", "", "failed format rewards since the step before"),
    Metric("failures/degradation", "", "failed degradation rewards since the step before"),
    Metric("failures/understanding", "", "failed understanding rewards since the step before"),
    Metric("failures/generation", "", "failed generation rewards since the step before"),
    Metric("failures/samples_failed", "", "samples of the batch without a total reward"),
    Metric("failures/samples_dropped", "", "samples of the batch that were not trained on"),
    Metric("failures/groups_too_small", "", "groups of the batch with too few valid samples"),
    Metric("failures/steps_skipped", "", "1 if nothing could be trained on in this step"),
    Metric("time/step", "s", "from the push before to this push; of the first step, from the start of the run"),
    Metric("time/generate", "s", "mean time in which a group of the batch was generated"),
    Metric("time/reward", "s", "mean time for which a group of the batch waited for reward servers"),
    Metric("time/wait_batch", "s", "for which the learner waited for the batch"),
    Metric("time/learner_step", "s", "of the learner: reference, training and push"),
    Metric("time/reference", "s", "log-probs of the reference", "the step was skipped"),
    Metric("time/train", "s", "the step without the push", "the step was skipped"),
    Metric("time/push_total", "s", "weight push as a whole"),
    Metric("time/push_gather", "s", "shards to whole tensors"),
    Metric("time/push_send", "s", "until the buckets were handed over"),
    Metric("time/push_transfer", "s", "until the actors had the bytes; overlaps with both; slowest actor, as below"),
    Metric("time/push_verify", "s", "checksums"),
    Metric("time/push_pause", "s", "until generation stood still"),
    Metric("time/push_load", "s", "weights into the engine"),
    Metric("time/push_resume", "s", "until generation went on"),
    Metric("idle/actors", "0..1", "share of the step in which no group was with the actors"),
    Metric("idle/learner", "0..1", "share of the step in which the learner waited for its batch"),
    Metric("reward_hidden", "0..1", "share of the time for rewards in which generation went on"),
    Metric("throughput/tokens_per_s", "1/s", "trained tokens per second of training", "the step was skipped"),
    Metric("throughput/sampled_tokens_per_s", "1/s", "sampled tokens per second of the step"),
    Metric("throughput/discarded_tokens_per_s", "1/s", "tokens of chains that a push made begin again, per second"),
    Metric("throughput/images_per_s", "1/s", "images per second of the step"),
    Metric("weights/version", "", "version that the actors serve: the step's number"),
    Metric("weights/bytes", "bytes", "of a push"),
    Metric("weights/receivers", "", "actors that took the push"),
)
"""Of `train`, once for each step."""

LIVE = (
    Metric("groups/admitted", "", "groups that wait to be generated"),
    Metric("groups/generating", "", "groups that are generated"),
    Metric("groups/scoring", "", "groups that wait for their rewards"),
    Metric("groups/ready", "", "scored groups: those of the batch in training and those that wait for it"),
    Metric("progress/quiet_s", "s", "since a group got its rewards or a step was done; the watchdog's clock"),
    Metric("rollout/actors_down", "", "rollout actors that do not serve"),
    Metric("rewards/left_alone", "", "reward servers that failed again and again and are not asked for a while"),
)
"""Of `train`, once a second while it trains, at the Prometheus endpoint only; `rl-system status` shows the same."""

COLD_START = (
    Metric("loss/total", "nats", "mean negative log-prob of a target id, and the z-loss"),
    Metric("loss/z", "nats", "its part that keeps the log-sum-exp small"),
    Metric("loss/text", "nats", "of text ids before it"),
    Metric("loss/last_text", "nats", "of ids after the last image"),
    Metric("loss/code", "nats", "of image codes"),
    *(
        Metric(f"heldout/loss/{name}", "nats", f"`loss/{name}` on held-out examples", "steps between evaluations")
        for name in ("total", "z", "text", "last_text", "code")
    ),
    Metric("learner/grad_norm", "", "gradient norm before clipping"),
    Metric("learner/learning_rate", "", "learning rate of the step"),
    Metric("time/train", "s", "the step"),
    Metric("throughput/tokens_per_s", "1/s", "trained tokens per second of training"),
)
"""Of `cold-start`, once for each step."""

MEANINGS = {metric.name: metric.meaning for metric in (*COLD_START, *GRPO, *LIVE)}


def prometheus_name(name: str) -> str:
    """A metric's name as ``ray.util.metrics`` gets it; at the endpoint it begins with ``ray_``."""
    return PREFIX + re.sub(r"[^a-zA-Z0-9_]", "_", name)


def table(metrics: Sequence[Metric]) -> str:
    """Markdown."""
    rows = ["| metric | at the endpoint | unit | what | absent when |", "|---|---|---|---|---|"]
    for m in metrics:
        rows.append(f"| `{m.name}` | `ray_{prometheus_name(m.name)}` | {m.unit} | {m.meaning} | {m.absent} |")
    return "\n".join(rows)


if __name__ == "__main__":
    print("\n\n".join(map(table, (GRPO, LIVE, COLD_START))))
