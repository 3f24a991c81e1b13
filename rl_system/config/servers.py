"""Which reward servers a configuration needs, and which checkpoints."""

from __future__ import annotations

from typing import TypeAlias

from rl_system.config.schema import (
    ExtraRewardConfig,
    GroundedSamServerConfig,
    IqaServerConfig,
    TrainConfig,
    VisualExpertServerConfig,
)

ServerConfig: TypeAlias = GroundedSamServerConfig | VisualExpertServerConfig | IqaServerConfig | ExtraRewardConfig

EXPERTS = {"qwen_vl": "qwen_vl", "perceptual": "iqa", "generative": "iqa"}
"""``reward.expert`` -> the server that it asks; each is a key of ``reward``."""

OBJECTS = {
    "grounded_sam": ("grounded_sam",),
    "tagged_grounded_sam": ("grounded_sam", "qwen_vl"),
    "qwen_vl": ("qwen_vl",),
    "file": (),
}
"""``reward.objects`` -> the servers that it asks."""


def servers(config: TrainConfig) -> tuple[str, ...]:
    """Names of the servers that a run asks; a reward of weight 0 needs none.

    Raises:
        ValueError: ``reward.objects`` or ``reward.expert`` is not one.
    """
    reward = config.reward
    for key, value, known in (("objects", reward.objects, OBJECTS), ("expert", reward.expert, EXPERTS)):
        if value not in known:
            raise ValueError(f"reward.{key}={value} is not known; allowed: {', '.join(known)}")
    objects = OBJECTS[reward.objects] if reward.weights.understanding > 0 else ()
    expert = (EXPERTS[reward.expert],) if reward.weights.generation > 0 else ()
    extra = (name for name, custom in reward.extra.items() if custom.weight > 0)
    return tuple(dict.fromkeys((*objects, *expert, *extra)))


def server_config(config: TrainConfig, name: str) -> ServerConfig:
    """The settings of one server. Raises KeyError for one that there is not."""
    reward = config.reward
    return reward.extra[name] if name in reward.extra else vars(reward)[name]


def own_servers(config: TrainConfig) -> tuple[str, ...]:
    """Those of :func:`servers` that the run starts itself: none with ``reward.url``.

    Raises:
        ValueError: as :func:`servers`.
    """
    return servers(config) if config.reward.url is None else ()


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
    }
    policy = {"policy.path": config.policy.path, "policy.image_tokenizer": config.policy.image_tokenizer}
    return policy | {key: path for name in own_servers(config) for key, path in of_server.get(name, {}).items()}
