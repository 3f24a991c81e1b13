"""Which reward servers a configuration needs, and which checkpoints."""

from __future__ import annotations

from rl_system.config.schema import TrainConfig

EXPERTS = {"qwen_vl": "qwen_vl", "perceptual": "iqa", "generative": "iqa"}
"""``reward.expert`` -> the server that it asks; each is a key of ``reward``."""


def servers(config: TrainConfig) -> tuple[str, ...]:
    """Names of the servers that a run asks; a reward of weight 0 needs none.

    Raises:
        ValueError: ``reward.expert`` is not one.
    """
    weights, expert = config.reward.weights, config.reward.expert
    if expert not in EXPERTS:
        raise ValueError(f"reward.expert={expert} is not known; allowed: {', '.join(EXPERTS)}")
    objects = ["grounded_sam"] if weights.understanding > 0 else []
    return (*objects, *([EXPERTS[expert]] if weights.generation > 0 else []))


def checkpoints(config: TrainConfig) -> dict[str, str]:
    """Setting -> directory of a checkpoint that the run reads.

    Raises:
        ValueError: as :func:`servers`.
    """
    sam, expert = config.reward.grounded_sam, config.reward.qwen_vl
    of_server = {
        "grounded_sam": {
            "reward.grounded_sam.detector": sam.detector,
            "reward.grounded_sam.segmenter": sam.segmenter,
        },
        "qwen_vl": {"reward.qwen_vl.model": expert.model},
        "iqa": {},
    }
    policy = {"policy.path": config.policy.path, "policy.image_tokenizer": config.policy.image_tokenizer}
    return policy | {key: path for name in servers(config) for key, path in of_server[name].items()}
