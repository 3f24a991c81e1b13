"""Whether every actor, learner rank and Serve replica of an experiment has its place in a worker group.

What is requested is read where the run itself reads it (``rl_system.assembly``), and what a pod offers where Ray's
autoscaler reads it. Actors that count no resources (experience queue, weight store) fit everywhere and are left out.
"""

from __future__ import annotations

import importlib.util
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from rl_system.config.compose import ConfigError, compose_config
from rl_system.config.schema import TrainConfig
from rl_system.config.servers import checkpoints, own_servers
from rl_system.config.uris import is_uri
from rl_system.k8s.manifests import Manifest, Problem, RayClusterSpec, clusters, settings

TRAIN = ["python", "-m", "rl_system", "train"]
ENTRYPOINT = "rl-system/entrypoint"
MOUNTS = {"runs": "/runs", "models": "/models"}
POOL_OF_APP = {"grounded_sam": "reward-sam", "qwen_vl": "reward-vlm", "iqa": "reward-vlm"}
"""The metrics server takes the place of the visual expert, never a place beside it."""
POOL_LABEL = "rl.io/pool"

SETTING_OF = {"CPU": "cpu", "GPU": "gpus"}


@dataclass(frozen=True)
class Request:
    """``count`` processes of one kind. ``pool``: the worker group that is meant for them; ``resources``: of one,
    as Ray counts them; ``selector``: the node labels that the configuration asks for."""

    what: str
    pool: str
    count: int
    resources: Mapping[str, float]
    selector: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Group:
    """A worker group as the autoscaler sees it: number of pods, and resources and labels of one."""

    name: str
    pods: int
    resources: Mapping[str, float]
    labels: Mapping[str, str]

    def room(self, request: Request) -> int:
        """How many of ``request`` the whole group holds."""
        per_pod = [_per_pod(self, request, name) for name, need in request.resources.items() if need]
        return self.pods * min(per_pod, default=request.count)

    def selected(self, request: Request) -> bool:
        """Whether the labels are those that ``request`` asks for."""
        return all(self.labels.get(key) == value for key, value in request.selector.items())


def problems(manifests: list[Manifest]) -> Iterator[Problem]:
    """Requests without a place, in clusters that are otherwise sound."""
    for cluster in clusters(manifests):
        # `train` refuses a cluster that has not yet all it needs (assembly.check_resources): what it starts with must
        # fit the smallest size of the groups, what it grows to the largest.
        bounds = ("max",) if cluster.manifest.kind == "RayService" else ("min", "max")
        try:
            wanted = {bound: _wanted(cluster.manifest, bound) for bound in bounds}
        except ValueError as error:
            yield cluster.manifest.problem("the run", str(error), f"correct it in {_file(manifests)}")
            continue
        if cluster.manifest.kind != "RayService":
            yield from _paths(cluster.manifest, _training_config(cluster.manifest))
        for bound in bounds:
            groups = worker_groups(cluster, bound)
            found = list(unplaced(wanted[bound], groups, cluster.manifest, _file(manifests), bound))
            yield from found
            if found:
                break


def _wanted(manifest: Manifest, bound: str) -> list[Request]:
    if manifest.kind == "RayService":
        return _service_requests(manifest)
    return training_requests(_training_config(manifest), bound)


def training_requests(config: TrainConfig, bound: str) -> list[Request]:
    """What one training run asks Ray for. ``bound``: ``min``, when it starts, or ``max``, with all the replicas that
    autoscaling allows."""
    from rl_system import assembly

    rollout, learner = config.rollout, config.learner
    ranks = {"CPU": learner.num_cpus, "GPU": float(learner.use_gpu)}
    actors = {"CPU": rollout.num_cpus, "GPU": rollout.num_gpus}
    return [
        Request("rollout actor", "rollout", rollout.actors, actors, rollout.labels),
        Request("learner rank", "learner", learner.ranks, ranks, learner.labels),
        *(
            _app_request(app, (app.autoscaling or {}).get(f"{bound}_replicas", app.num_replicas))
            for name, app in assembly.reward_apps(config).items()
            if name in own_servers(config)
        ),
    ]


def unplaced(
    wanted: list[Request], groups: list[Group], manifest: Manifest, file: str, bound: str
) -> Iterator[Problem]:
    """Requests whose labels do not choose the one group that is meant for them, or that do not fit it.

    Args:
        wanted: what is asked for.
        groups: of one cluster.
        manifest: that holds the cluster.
        file: where sizes are set.
        bound: ``min`` or ``max``, which of the two sizes counts.
    """
    for request in wanted:
        selected = [group for group in groups if group.selected(request)]
        where = f"{manifest.kind} {manifest.name}"
        if not request.selector:
            wrong = f"{request.what} asks for no node label, so Ray may place it in any group"
            yield Problem(file, where, wrong, f"use cluster=kubernetes, which binds it to {request.pool}")
        elif [group.name for group in selected] != [request.pool]:
            names = ", ".join(group.name for group in selected) or "no group"
            fix = f"{request.pool} alone should have these labels"
            yield Problem(file, where, f"{request.what} asks for {dict(request.selector)}: {names} has them", fix)
        elif (room := selected[0].room(request)) < request.count:
            yield Problem(file, where, *_shortfall(request, selected[0], room, bound))


def worker_groups(cluster: RayClusterSpec, bound: str) -> list[Group]:
    """The worker groups as Ray's own autoscaler reads them. ``bound``: ``min`` or ``max`` pods."""
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

    resource = {"metadata": {"name": cluster.manifest.name, "namespace": "any"}, "spec": cluster.spec}
    derived = _derive_autoscaling_config_from_ray_cr(resource)
    return [
        Group(name, kind[f"{bound}_workers"], kind["resources"], kind["labels"])
        for name, kind in derived["available_node_types"].items()
        if name != derived["head_node_type"]
    ]


def _shortfall(request: Request, group: Group, room: int, bound: str) -> tuple[str, str]:
    needs = ", ".join(f"{amount:g} {name}" for name, amount in request.resources.items() if amount)
    short = [n for n, need in request.resources.items() if need > group.resources.get(n, 0)]
    wrong = f"group {group.name} has room for {room} of {request.count} {request.what}s ({needs} each)"
    if short:
        pod = ", ".join(f"{group.resources.get(n, 0):g} {n}" for n in short)
        return f"{wrong}; its pods have {pod}", f"raise {', '.join(f'{group.name}-{SETTING_OF[n]}' for n in short)}"
    tightest = min((n for n, need in request.resources.items() if need), key=lambda n: _per_pod(group, request, n))
    return wrong, f"raise {group.name}-{bound} or {group.name}-{SETTING_OF[tightest]}, or ask for fewer"


def _per_pod(group: Group, request: Request, name: str) -> int:
    return int(group.resources.get(name, 0) // request.resources[name])


def _app_request(app: Any, count: int) -> Request:
    options = app.ray_actor_options
    resources = {"CPU": options.get("num_cpus", 1), "GPU": options.get("num_gpus", 0)}
    labels = options.get("label_selector") or {}
    pool = POOL_OF_APP.get(app.name) or labels.get(POOL_LABEL)
    if pool is None:
        raise ConfigError(
            f"reward.extra.{app.name} has no worker group of its own: choose one by "
            f"reward.extra.{app.name}.labels={{{POOL_LABEL}: reward-sam}}"
        )
    return Request(f"{app.name} replica", pool, count, resources, labels)


def _training_config(manifest: Manifest) -> TrainConfig:
    annotations = manifest.doc["metadata"].get("annotations") or {}
    entrypoint = manifest.doc["spec"].get("entrypoint") or annotations.get(ENTRYPOINT) or ""
    words = shlex.split(entrypoint)
    if words[: len(TRAIN)] != TRAIN:
        raise ConfigError(f"entrypoint {entrypoint!r} does not begin with {' '.join(TRAIN)!r}")
    return _composed(tuple(words[len(TRAIN) :]))


@lru_cache
def _composed(overrides: tuple[str, ...]) -> TrainConfig:
    return compose_config(overrides)


def _paths(manifest: Manifest, config: TrainConfig) -> Iterator[Problem]:
    if config.cluster.address != "auto":
        yield manifest.problem("entrypoint", "the run would start a Ray of its own", "add cluster=kubernetes")
    if not is_uri(config.output_dir) and not config.output_dir.startswith(MOUNTS["runs"]):
        fix = f"set output_dir={MOUNTS['runs']}"
        yield manifest.problem("entrypoint", f"output_dir={config.output_dir} is lost with the pod", fix)
    read = checkpoints(config) | {"reward.iqa.weights_dir": config.reward.iqa.weights_dir or ""}
    read |= {"data.path": config.data.path}
    for key, path in read.items():
        if Path(path).is_absolute() and not path.startswith(tuple(f"{m}/" for m in MOUNTS.values())):
            fix = f"put it under {' or '.join(MOUNTS.values())}, or give a path inside the image"
            yield manifest.problem("entrypoint", f"{key}={path} is on no volume", fix)


def _service_requests(manifest: Manifest) -> list[Request]:
    from rl_system import assembly

    config_of = {"grounded_sam": assembly.detector_app, "qwen_vl": assembly.expert_app, "iqa": assembly.iqa_app}
    wanted = []
    for app in _serve_config(manifest)["applications"]:
        if app["name"] not in config_of:
            raise ConfigError(f"serve-config: unknown application {app['name']}; known: {', '.join(config_of)}")
        _check_import(app["import_path"])
        overrides = shlex.split(str((app.get("args") or {}).get("overrides", "")))
        spec = config_of[app["name"]](_composed(tuple(overrides)))
        (deployment,) = app["deployments"]
        spec = replace(spec, ray_actor_options=deployment.get("ray_actor_options") or spec.ray_actor_options)
        scaling = deployment.get("autoscaling_config") or {}
        wanted.append(_app_request(spec, scaling.get("max_replicas") or deployment.get("num_replicas") or 1))
    return wanted


def _serve_config(manifest: Manifest) -> dict[str, Any]:
    """``serveConfigV2``, refused where Serve would pass over an unknown key."""
    from pydantic import ValidationError
    from ray.serve.schema import DeploymentSchema, ServeApplicationSchema, ServeDeploySchema

    try:
        parsed = yaml.safe_load(manifest.doc["spec"].get("serveConfigV2") or "")
        ServeDeploySchema.model_validate(parsed)
    except (yaml.YAMLError, ValidationError) as error:
        raise ConfigError(f"serve-config: {' '.join(str(error).split())[:300]}") from None
    for app in parsed["applications"]:
        for name, given, schema in (
            ("serve-config", parsed, ServeDeploySchema),
            (f"serve-config: {app['name']}", app, ServeApplicationSchema),
            *((f"serve-config: {d['name']}", d, DeploymentSchema) for d in app.get("deployments", [])),
        ):
            if unknown := sorted(set(given) - set(schema.model_fields)):
                raise ConfigError(f"{name}: unknown field {', '.join(unknown)}")
        if len(app.get("deployments", [])) != 1 or app["deployments"][0]["name"] != app["name"]:
            raise ConfigError(f"serve-config: application {app['name']} has one deployment, called {app['name']}")
    return parsed


def _check_import(import_path: str) -> None:
    module, _, function = import_path.partition(":")
    found = importlib.util.find_spec(module) if module.startswith("rl_system.") else None
    if found is None or found.origin is None or f"def {function}(" not in Path(found.origin).read_text():
        raise ConfigError(f"serve-config: import_path {import_path} does not exist")


def _file(manifests: list[Manifest]) -> str:
    found = settings(manifests)
    return found.file if found else "settings.yaml"
