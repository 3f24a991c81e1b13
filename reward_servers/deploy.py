"""Reward servers as Ray Serve applications, one per reward model.

Every application has its own replicas, resources, queue and health check, so that each scales, fails and recovers on
its own. No HTTP proxy is started: inside a job, requests go through deployment handles.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import numpy as np
import ray
from ray import serve
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from reward_servers.contract import Detection, Judgement, RewardServerError
from reward_servers.grounded_sam import GroundedSam, GroundedSamConfig, check_image
from reward_servers.qwen_vl import VisualExpert, VisualExpertConfig, process_environment

CONSTRUCTOR_RETRIES = 2
"""A replica that then still cannot be built has a bad configuration; Serve's default of 20 hides it for minutes."""

Image: TypeAlias = np.ndarray | ray.ObjectRef
"""uint8 [H, W, 3] RGB, or a reference to one in Ray's object store."""


@dataclass(frozen=True)
class RewardAppSpec:
    """How one reward application runs.

    Attributes:
        name: of the application, unique on the cluster.
        num_replicas: fixed number of replicas; ignored with ``autoscaling``.
        autoscaling: Serve's ``AutoscalingConfig`` as a mapping (``min_replicas``, ``max_replicas``, ...).
        ray_actor_options: of each replica: ``num_cpus``, ``num_gpus``, ``label_selector``, ``runtime_env`` ...
        max_ongoing_requests: that a replica works on at the same time; at least the batch size, or no batch fills.
        max_queued_requests: that wait at a handle; more are refused at once with ``BackPressureError``.
        batch_size: largest batch of one model call.
        batch_wait_s: how long the first request of a batch waits for others, seconds.
        health_check_period_s: seconds between two health checks.
        health_check_timeout_s: seconds after which a check has failed.
        graceful_shutdown_timeout_s: seconds that a stopping replica has for its requests.
    """

    name: str
    num_replicas: int = 1
    autoscaling: Mapping[str, Any] | None = None
    ray_actor_options: Mapping[str, Any] = field(default_factory=lambda: {"num_cpus": 1})
    max_ongoing_requests: int = 16
    max_queued_requests: int = 64
    batch_size: int = 8
    batch_wait_s: float = 0.01
    health_check_period_s: float = 10.0
    health_check_timeout_s: float = 30.0
    graceful_shutdown_timeout_s: float = 5.0

    def __post_init__(self) -> None:
        for key in ("num_replicas", "max_ongoing_requests", "max_queued_requests", "batch_size"):
            if getattr(self, key) < 1:
                raise ValueError(f"reward application {self.name}: {key} must be at least 1, got {getattr(self, key)}")


def deploy_grounded_sam(config: GroundedSamConfig, spec: RewardAppSpec) -> DeploymentHandle:
    """Serve Grounded-SAM; ``handle.objects.remote(image)`` answers a :class:`Detection`.

    Blocks as :func:`deploy_app`.
    """
    return deploy_app(GroundedSamReplica, spec, config, spec.batch_size, spec.batch_wait_s)


def deploy_visual_expert(config: VisualExpertConfig, spec: RewardAppSpec) -> DeploymentHandle:
    """Serve the visual expert; ``handle.judge.remote(lr, images, seed)`` answers one :class:`Judgement` per image.

    Blocks as :func:`deploy_app`.
    """
    options = dict(spec.ray_actor_options)
    runtime = dict(options.get("runtime_env") or {})
    # vLLM reads these at import: they must be there when the replica's process starts.
    runtime["env_vars"] = process_environment(config) | dict(runtime.get("env_vars") or {})
    options["runtime_env"] = runtime
    return deploy_app(VisualExpertReplica, replace(spec, ray_actor_options=options), config)


def deploy_app(replica: type, spec: RewardAppSpec, *arguments: Any) -> DeploymentHandle:
    """Run ``replica(*arguments)`` as the application ``spec.name`` and wait until it is healthy.

    Raises:
        RewardServerError: no replica could be started.
    """
    scaling: dict[str, Any] = (
        {"num_replicas": spec.num_replicas}
        if spec.autoscaling is None
        else {"autoscaling_config": dict(spec.autoscaling)}
    )
    decorated: Any = serve.deployment(replica)
    deployment = decorated.options(
        name=spec.name,
        ray_actor_options=dict(spec.ray_actor_options),
        max_ongoing_requests=spec.max_ongoing_requests,
        max_queued_requests=spec.max_queued_requests,
        health_check_period_s=spec.health_check_period_s,
        health_check_timeout_s=spec.health_check_timeout_s,
        graceful_shutdown_timeout_s=spec.graceful_shutdown_timeout_s,
        max_constructor_retry_count=CONSTRUCTOR_RETRIES,
        **scaling,
    )
    serve.start(proxy_location="Disabled")
    try:
        return serve.run(deployment.bind(*arguments), name=spec.name, route_prefix=None)
    except RuntimeError as error:
        raise RewardServerError(f"reward application {spec.name} did not start: {_last_words(spec.name)}") from error


def delete_apps(*names: str) -> None:
    """Delete the named applications. One that does not exist is no error, nor is a cluster without Serve."""
    for name in names:
        try:
            serve.delete(name)
        except RayServeException:  # Serve is not running
            return


def _last_words(name: str) -> str:
    """Why Serve gave up on an application: the last line of the replica's own error, where there is one."""
    status = serve.status().applications[name]
    messages = [deployment.message for deployment in status.deployments.values()] + [status.message]
    lines = [line.strip() for line in messages[0].splitlines() if "Error" in line]
    return lines[-1] if lines else " ".join(filter(None, messages))


class GroundedSamReplica:
    """One Grounded-SAM process; requests that arrive together make one batch."""

    def __init__(self, config: GroundedSamConfig, batch_size: int, batch_wait_s: float) -> None:
        self._model = GroundedSam(config)
        batched: Any = self._detect
        batched.set_max_batch_size(batch_size)
        batched.set_batch_wait_timeout_s(batch_wait_s)

    async def objects(self, image: Image) -> Detection:
        """Objects of one image. Raises ValueError for a bad one, before it can spoil the batch of others."""
        pixels = await fetched(image)
        check_image(pixels)
        return await self._detect(pixels)

    async def ready(self) -> dict[str, Any]:
        """Checkpoints, process id and versions as imported here."""
        import torch
        import transformers

        config = self._model.config
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        return {"detector": config.detector, "segmenter": config.segmenter, "pid": os.getpid(), **versions}

    @serve.batch
    async def _detect(self, images: list[np.ndarray]) -> list[Detection]:
        return await asyncio.to_thread(self._model.detect, images)


class VisualExpertReplica:
    """One visual expert; vLLM inside batches the requests."""

    def __init__(self, config: VisualExpertConfig) -> None:
        self._expert = VisualExpert(config)

    async def judge(self, lr: Image, images: Sequence[Image], seed: int) -> list[Judgement]:
        """As :meth:`VisualExpert.judge`."""
        reference, *shown = await asyncio.gather(fetched(lr), *(fetched(image) for image in images))
        return await self._expert.judge(reference, shown, seed)

    async def ready(self) -> dict[str, Any]:
        """As :meth:`VisualExpert.ready`."""
        return await self._expert.ready()

    async def check_health(self) -> None:
        """Serve replaces the replica when this raises."""
        await self._expert.check_health()

    def __del__(self) -> None:
        if hasattr(self, "_expert"):
            self._expert.shutdown()


async def fetched(image: Image) -> np.ndarray:
    """The image itself; references inside lists reach a replica as references."""
    return await image if isinstance(image, ray.ObjectRef) else image
