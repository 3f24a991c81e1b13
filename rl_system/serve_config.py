"""Reward servers that run on their own: their Serve configuration, and changes to one that is deployed.

A change reads what is deployed, alters its own field and puts the whole back, which Serve answers with the least that
it can: another range of replicas or other live settings restart nothing, and other applications are not touched. Two
changes at the same moment are not kept apart: the later one wins.
"""

from __future__ import annotations

import copy
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from reward_servers import grounded_sam, qwen_vl
from reward_servers.client import GROUNDED_SAM, IQA, QWEN_VL
from reward_servers.expert_chat import ExpertPrompt
from reward_servers.live_settings import with_settings
from rl_system import assembly
from rl_system.config.compose import compose_config
from rl_system.config.schema import TrainConfig
from rl_system.config.servers import servers

BUILDERS = {GROUNDED_SAM: "grounded_sam", QWEN_VL: "visual_expert", IQA: "iqa"}
"""Server -> its builder in :mod:`rl_system.reward_apps`."""
_GIVEN_UP = ("DEPLOY_FAILED", "UNHEALTHY")
_CONNECT_S = 10.0


def serve_config(config: TrainConfig, overrides: Sequence[str], host: str, port: int) -> dict[str, Any]:
    """Ray Serve's declarative configuration (``serveConfigV2``) of the servers that ``config`` asks.

    Args:
        config: composed from ``overrides``, which the servers' processes compose again.
        host, port: of the HTTP proxies.

    Raises:
        ValueError: the configuration has a server that cannot be asked over HTTP, or none at all.
    """
    if config.reward.url is not None:
        raise ValueError(f"reward.url={config.reward.url} is for the run that asks the servers; leave it out here")
    names = servers(config)
    own = [name for name in names if name not in BUILDERS]
    if own or not names:
        raise ValueError(
            f"reward.extra.{own[0]} is served inside a job only" if own else "this configuration asks no reward server"
        )
    return {
        "proxy_location": "EveryNode",
        "http_options": {"host": host, "port": port},
        "applications": [_application(config, name, overrides) for name in names],
    }


def _application(config: TrainConfig, name: str, overrides: Sequence[str]) -> dict[str, Any]:
    return {
        "name": name,
        "route_prefix": f"/{name}",
        "import_path": f"rl_system.reward_apps:{BUILDERS[name]}",
        "args": {"overrides": shlex.join(overrides)},
        "deployments": [assembly.app_spec(config, name).deployment_options()],
    }


class ServeCluster:
    """Serve on a cluster, through the REST interface of its dashboard.

    Args:
        address: of the dashboard, ``http://HOST:8265``.

    Raises:
        ConnectionError: nobody answers there.
    """

    def __init__(self, address: str) -> None:
        import requests
        from ray.dashboard.modules.serve.sdk import ServeSubmissionClient

        try:
            requests.get(address, timeout=_CONNECT_S)  # Ray's client waits for ever
            self._client = ServeSubmissionClient(address)
        except (ConnectionError, RuntimeError, ValueError, requests.RequestException) as error:
            raise ConnectionError(
                f"no Ray dashboard at {address} ({type(error).__name__}); `rl-system serve-rewards start` says the "
                "address of the one that it starts, and RAY_AUTH_MODE=token with RAY_AUTH_TOKEN opens a protected one"
            ) from None

    def deployed(self) -> dict[str, Any]:
        """The configuration in force, as it could be put again."""
        details = self._client.get_serve_details()
        options = {key: details[key] for key in ("proxy_location", "http_options") if details.get(key)}
        # A run's own applications have none: no configuration deployed them, and none ends them.
        given = (app["deployed_app_config"] for app in details["applications"].values())
        return {**options, "applications": [copy.deepcopy(app) for app in given if app is not None]}

    def status(self) -> dict[str, dict[str, Any]]:
        """Application -> status, message, range of replicas, states of its replicas, live settings."""
        return {name: _status(app) for name, app in self._client.get_serve_details()["applications"].items()}

    def deploy(self, config: Mapping[str, Any]) -> None:
        """Put ``config``. Applications that run and are not in it are kept as they are.

        Raises:
            ValueError: Serve runs already with HTTP proxies elsewhere; it would keep those.
        """
        deployed = self.deployed()
        if deployed["applications"]:
            there, wanted = (c["http_options"] for c in (deployed, config))
            for key in ("host", "port"):
                if there.get(key) != wanted[key]:
                    raise ValueError(f"Serve runs on this cluster with {key} {there.get(key)}, not {wanted[key]}")
        ours = {app["name"] for app in config["applications"]}
        others = [app for app in deployed["applications"] if app["name"] not in ours]
        self._put({**config, "applications": [*others, *config["applications"]]})

    def wait_running(self, names: Sequence[str], timeout_s: float) -> None:
        """Wait until the applications run.

        Raises:
            RuntimeError: one failed to start, or the time is over; says which and why.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            now = self.status()
            states = {name: now.get(name, {"status": "NOT_STARTED", "message": ""}) for name in names}
            if all(state["status"] == "RUNNING" for state in states.values()):
                return
            failed = [f"{name}: {now['message']}" for name, now in states.items() if now["status"] in _GIVEN_UP]
            if failed:
                raise RuntimeError("; ".join(failed))
            if time.monotonic() > deadline:
                waiting = ", ".join(f"{name} is {state['status']}" for name, state in states.items())
                raise RuntimeError(f"not all servers run after {timeout_s:g} s: {waiting}")
            time.sleep(1.0)

    def scale(self, name: str, least: int, most: int) -> None:
        """Between ``least`` and ``most`` replicas from now on; equal: always so many.

        Raises:
            ValueError: no such application, or no such range.
        """
        if not 1 <= least <= most:
            raise ValueError(f"the range of replicas must be 1 <= LEAST <= MOST, got {least} and {most}")
        config = self.deployed()
        scaling = _deployment(config, name).get("autoscaling_config")
        if not scaling:  # to add one would replace every replica
            raise ValueError(f"{name} has a fixed number of replicas; deploy it by `rl-system serve-rewards start`")
        scaling |= {"min_replicas": least, "max_replicas": most}
        scaling.pop("initial_replicas", None)
        self._put(config)

    def set_live(self, name: str, settings: Mapping[str, Any]) -> None:
        """Change live settings; those that are not named stay as they are.

        Raises:
            ValueError: no such application or setting, or a bad value: a replica would refuse it too.
        """
        config = self.deployed()
        deployment = _deployment(config, name)
        changed = _merged(deployment.get("user_config") or {}, settings)
        overrides = shlex.split(_named(config, name)["args"]["overrides"])
        check_live(name, compose_config(overrides), changed)
        deployment["user_config"] = changed
        self._put(config)

    def delete(self, names: Sequence[str]) -> None:
        """End these applications; others stay."""
        config = self.deployed()
        config["applications"] = [app for app in config["applications"] if app["name"] not in names]
        self._put(config)

    def _put(self, config: dict[str, Any]) -> None:
        self._client.deploy_applications(config)


def check_live(name: str, config: TrainConfig, settings: Mapping[str, Any]) -> None:
    """Raises ValueError unless the server ``name`` of ``config`` can change to these settings while it serves."""
    if name == GROUNDED_SAM:
        changed = with_settings(assembly.detector_config(config), settings, grounded_sam.LIVE, name)
        grounded_sam.check_vocabulary(changed)
    elif name == QWEN_VL:
        # Without a prompt of its own the checkpoint's is used; its fields are the same.
        expert = assembly.expert_config(config)
        with_settings(replace(expert, prompt=expert.prompt or ExpertPrompt()), settings, qwen_vl.LIVE, name)
    elif settings:
        raise ValueError(f"{name} has no live settings, got {', '.join(settings)}")


def _merged(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """``new`` over ``old``; of mappings only what ``new`` names changes."""
    parts = [key for key, value in new.items() if isinstance(value, dict) and isinstance(old.get(key), dict)]
    return {**old, **new, **{key: _merged(old[key], new[key]) for key in parts}}


def _status(app: Mapping[str, Any]) -> dict[str, Any]:
    deployment: Mapping[str, Any] = next(iter(app["deployments"].values()), {})
    given = deployment.get("deployment_config") or {}
    scaling = given.get("autoscaling_config") or {}
    return {
        "status": app["status"],
        "message": app["message"] or deployment.get("message", ""),
        "range": (scaling.get("min_replicas"), scaling.get("max_replicas")),
        "replicas": [{key: r.get(key) for key in ("state", "pid", "node_ip")} for r in deployment.get("replicas", [])],
        "settings": given.get("user_config") or {},
    }


def _named(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    for app in config["applications"]:
        if app["name"] == name:
            return app  # type: ignore[no-any-return]
    there = ", ".join(app["name"] for app in config["applications"]) or "none"
    raise ValueError(f"there is no application {name}; there are: {there}")


def _deployment(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The application's one deployment, inside ``config``."""
    (deployment,) = _named(config, name)["deployments"]
    return deployment  # type: ignore[no-any-return]
