"""Reward servers as Ray Serve applications, one per reward model.

Every application has its own replicas, resources, queue and health check, so that each scales, fails and recovers on
its own. Inside a job requests go through deployment handles and no HTTP proxy is started; over HTTP the same replicas
answer behind ``http_routes``.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import Any

from ray import serve
from ray.serve import Application
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from reward_servers.client import GROUNDED_SAM, IQA, QWEN_VL
from reward_servers.contract import RewardServerError
from reward_servers.grounded_sam import GroundedSamConfig
from reward_servers.iqa import IqaConfig
from reward_servers.qwen_vl import VisualExpertConfig, process_environment
from reward_servers.replicas import CustomReplica, GroundedSamReplica, IqaReplica, VisualExpertReplica

CONSTRUCTOR_RETRIES = 2
"""A replica that then still cannot be built has a bad configuration; Serve's default of 20 hides it for minutes."""
LOOK_S = 1.0
"""Between two looks at the applications: each pickles Serve's router for every one of them, some 0.2 s of CPU."""


_NEVER = ("DEPLOY_FAILED", "UNHEALTHY", "DELETING", "DELETED")
"""States from which an application that starts does not get to RUNNING."""


@dataclass(frozen=True)
class RewardAppSpec:
    """How one reward application runs.

    Attributes:
        name: of the application, unique on the cluster.
        num_replicas: number of replicas; ignored with ``autoscaling``.
        autoscaling: Serve's ``AutoscalingConfig`` as a mapping (``min_replicas``, ``max_replicas``, ...).
        ray_actor_options: of each replica: ``num_cpus``, ``num_gpus``, ``label_selector``, ``runtime_env`` ...
        max_ongoing_requests: that a replica works on at the same time; at least the batch size, or no batch fills.
        max_queued_requests: that wait at a handle; more are refused at once with ``BackPressureError``.
        batch_size: largest batch of one model call.
        batch_wait_s: how long a model that has nothing to do waits for a batch to fill, seconds.
        health_check_period_s: seconds between two health checks.
        health_check_timeout_s: seconds after which a check has failed.
        graceful_shutdown_timeout_s: seconds that a stopping replica has for its requests.
        user_config: live settings that replicas start with.
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
    user_config: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for key in ("num_replicas", "max_ongoing_requests", "max_queued_requests", "batch_size"):
            if getattr(self, key) < 1:
                raise ValueError(f"reward application {self.name}: {key} must be at least 1, got {getattr(self, key)}")

    def deployment_options(self) -> dict[str, Any]:
        """Settings of the deployment, as Serve names them.

        A fixed number is an autoscaling range of one: Serve replaces every replica of a deployment that gains or loses
        its ``autoscaling_config``, but only adds or ends some when the range changes.
        """
        fixed = {"min_replicas": self.num_replicas, "max_replicas": self.num_replicas}
        return {
            "name": self.name,
            "autoscaling_config": fixed if self.autoscaling is None else dict(self.autoscaling),
            "ray_actor_options": dict(self.ray_actor_options),
            "max_ongoing_requests": self.max_ongoing_requests,
            "max_queued_requests": self.max_queued_requests,
            "health_check_period_s": self.health_check_period_s,
            "health_check_timeout_s": self.health_check_timeout_s,
            "graceful_shutdown_timeout_s": self.graceful_shutdown_timeout_s,
            "user_config": dict(self.user_config),
            "logging_config": {"encoding": "JSON"},
        }


def grounded_sam_app(config: GroundedSamConfig, spec: RewardAppSpec, http: bool = False) -> Application:
    """Grounded-SAM; ``handle.objects.remote(image=...)`` answers a :class:`Detection`. ``http``: routes too."""
    return application(
        _served(GroundedSamReplica, GROUNDED_SAM, http), spec, config, spec.batch_size, spec.batch_wait_s
    )


def visual_expert_app(config: VisualExpertConfig, spec: RewardAppSpec, http: bool = False) -> Application:
    """The visual expert; ``handle.judge.remote(lr=, images=, seed=)`` answers one :class:`Judgement` per image."""
    # vLLM reads these at import: they must be there when the replica's process starts.
    spec = with_environment(spec, process_environment(config))
    return application(_served(VisualExpertReplica, QWEN_VL, http), spec, config)


def iqa_app(config: IqaConfig, spec: RewardAppSpec, http: bool = False) -> Application:
    """The metrics; ``handle.measure.remote(images=, reference=)`` answers a :class:`Measurement`."""
    return application(_served(IqaReplica, IQA, http), spec, config, spec.batch_size, spec.batch_wait_s)


def custom_app(target: str, options: Mapping[str, Any], spec: RewardAppSpec) -> Application:
    """A reward of the user's own; ``handle.score.remote(lr=, images=)`` answers a number in [0, 1] per image."""
    # The folder under which the module's name is found: one up for every dot in it, and one for a package itself.
    module = import_module(target.partition(":")[0])
    file = Path(str(module.__file__)).resolve()
    folder = file.parents[module.__name__.count(".") + (file.name == "__init__.py")]
    return application(CustomReplica, spec, target, dict(options), str(folder))


def application(replica: type, spec: RewardAppSpec, *arguments: Any) -> Application:
    """``replica(*arguments)`` as an application; not deployed. ``replica`` has ``reconfigure`` (``user_config``)."""
    decorated: Any = serve.deployment(replica)
    options = spec.deployment_options() | {"max_constructor_retry_count": CONSTRUCTOR_RETRIES}
    return decorated.options(**options).bind(*arguments)


def deploy(
    apps: Mapping[str, Application], timeout_s: float = 600.0, stop: threading.Event | None = None
) -> dict[str, DeploymentHandle]:
    """Run applications for this job, without an HTTP proxy, and wait until all are healthy; their handles.

    Args:
        apps: by name. One that runs already under its name is replaced.
        timeout_s: how long that may take.
        stop: set by another thread that wants no applications any more; those that were begun are deleted.

    Raises:
        RewardServerError: no replica of one could be started, the time is over, or ``stop``; says which and why.
    """
    if not apps:  # a run whose rewards need no server; Serve refuses to run nothing
        return {}
    serve.start(proxy_location="Disabled")
    targets = [serve.RunTarget(app, name=name, route_prefix=None) for name, app in apps.items()]
    # Serve's own wait has no end for an application that is deleted meanwhile.
    handles = serve.run_many(targets, wait_for_applications_running=False)
    stop = stop or threading.Event()
    deadline = time.monotonic() + timeout_s
    while True:
        there = serve.status().applications
        states = {name: there[name].status.value if name in there else "DELETED" for name in apps}
        if all(state == "RUNNING" for state in states.values()):
            return dict(zip(apps, handles, strict=True))
        if failed := [name for name, state in states.items() if state in _NEVER]:
            raise RewardServerError(
                "; ".join(f"reward application {name} did not start: {_last_words(name)}" for name in failed)
            )
        if stop.is_set():
            delete_apps(*apps)
            raise RewardServerError("the reward applications were stopped while they started")
        if time.monotonic() > deadline:
            waiting = ", ".join(f"{name} is {state}" for name, state in states.items() if state != "RUNNING")
            raise RewardServerError(f"not all reward applications run after {timeout_s:g} s: {waiting}")
        stop.wait(LOOK_S)


def delete_apps(*names: str) -> None:
    """Delete the named applications. One that does not exist is no error, nor is a cluster without Serve."""
    for name in names:
        try:
            serve.delete(name)
        except RayServeException:  # Serve is not running
            return


def _served(replica: type, server: str, http: bool) -> Any:
    """``replica``, behind the server's HTTP routes if it is to have them."""
    if not http:
        return replica
    from reward_servers.http_routes import routes

    return serve.ingress(routes(server))(replica)


def with_environment(spec: RewardAppSpec, variables: Mapping[str, str]) -> RewardAppSpec:
    """``spec`` whose replicas' processes start with these variables too; those that it sets itself stay."""
    options = dict(spec.ray_actor_options)
    runtime = dict(options.get("runtime_env") or {})
    runtime["env_vars"] = dict(variables) | dict(runtime.get("env_vars") or {})
    return replace(spec, ray_actor_options=options | {"runtime_env": runtime})


def _last_words(name: str) -> str:
    """Why Serve gave up on an application: the last line of the replica's own error, where there is one."""
    status = serve.status().applications.get(name)
    if status is None:
        return "it was deleted meanwhile"
    messages = [deployment.message for deployment in status.deployments.values()] + [status.message]
    lines = [line.strip() for line in messages[0].splitlines()] if messages else []
    errors = [line for line in lines if "Error" in line and not line.endswith("Traceback (most recent call last):")]
    return errors[-1] if errors else " ".join(filter(None, messages))
