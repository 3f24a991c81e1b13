"""``rl-system serve-rewards``: reward servers on their own cluster, asked over HTTP and scaled on their own."""

from __future__ import annotations

import argparse
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import yaml

from rl_system.commands import exit_codes

if TYPE_CHECKING:
    from rl_system.config.schema import TrainConfig

_DASHBOARD = "http://127.0.0.1:8265"
_START_TIMEOUT_S = 900.0


def run(args: list[str]) -> int:
    """Returns the exit code: 0 done, 1 error, 2 bad configuration or input."""
    options = _parser().parse_args(args)
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    try:
        options.do(options)
    except (ValueError, ConnectionError) as error:
        print(f"rl-system serve-rewards {options.action}: {error}", file=sys.stderr)
        return exit_codes.BAD_INPUT
    except RuntimeError as error:
        print(f"rl-system serve-rewards {options.action}: {error}", file=sys.stderr)
        return exit_codes.ERROR
    return exit_codes.OK


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("rl-system serve-rewards", description="docs/reward-servers.md")
    actions = parser.add_subparsers(dest="action", required=True)

    def action(name: str, do: Any, text: str) -> argparse.ArgumentParser:
        made = actions.add_parser(name, help=text)
        made.set_defaults(do=do)
        return made

    config = action("config", _config, "print the Serve configuration (serveConfigV2)")
    start = action("start", _start, "start the servers and, without --address, a Ray for them")
    for made in (config, start):
        made.add_argument("overrides", nargs="+", metavar="KEY=VALUE", help="as of `rl-system train`: experiment=...")
        made.add_argument("--host", default="127.0.0.1", help="that the HTTP proxies listen on (127.0.0.1)")
        made.add_argument("--port", type=int, default=8000)
    start.add_argument("--address", help="dashboard of a running cluster, http://HOST:8265; default: a Ray of its own")
    start.add_argument("--num-cpus", type=int, help="logical CPUs of a Ray of its own")
    start.add_argument("--dashboard-port", type=int, default=8265, help="of a Ray of its own")
    status = action("status", _status, "what runs where, with which settings")
    scale = action("scale", _scale, "change the number of replicas")
    live = action("set", _set, "change live settings, without a restart")
    for made in (status, scale, live):
        made.add_argument("--address", default=_DASHBOARD, help=f"of the dashboard ({_DASHBOARD})")
    scale.add_argument("app")
    scale.add_argument("least", type=int, help="replicas at least")
    scale.add_argument("most", type=int, nargs="?", help="replicas at most (LEAST: always so many)")
    live.add_argument("app")
    live.add_argument("settings", nargs="+", metavar="KEY=VALUE", help="values are YAML: box_threshold=0.3")
    return parser


def _composed(options: argparse.Namespace, compose: Callable[[Sequence[str]], TrainConfig]) -> dict[str, Any]:
    from rl_system.serve_config import serve_config

    return serve_config(compose(options.overrides), options.overrides, options.host, options.port)


def _config(options: argparse.Namespace) -> None:
    from rl_system.config.compose import compose_config  # the checkpoints are where it will be deployed

    print(yaml.safe_dump(_composed(options, compose_config), sort_keys=False, width=10_000), end="")


def _start(options: argparse.Namespace) -> None:
    from reward_servers.http_guard import token_of_environment
    from rl_system.config.compose import load_config
    from rl_system.serve_config import ServeCluster

    token_of_environment()
    config = _composed(options, load_config)
    names = [app["name"] for app in config["applications"]]
    if options.address is not None:
        cluster = ServeCluster(options.address)
        cluster.deploy(config)
        cluster.wait_running(names, _START_TIMEOUT_S)
        print(f"serving {', '.join(names)} on the cluster of {options.address}, port {options.port} of every node")
        return
    for host, port in ((options.host, options.port), ("127.0.0.1", options.dashboard_port)):
        try:
            socket.create_server((host, port)).close()
        except OSError as error:
            raise ValueError(f"{host}:{port} cannot be listened on ({error.strerror}); choose another port") from None
    _serve_here(config, names, options)


def _serve_here(config: dict[str, Any], names: Sequence[str], options: argparse.Namespace) -> None:
    """Until a signal comes."""
    import ray
    from ray import serve

    from rl_system.serve_config import ServeCluster

    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    ray.init(
        address="local",
        num_cpus=options.num_cpus,
        include_dashboard=True,
        dashboard_host="127.0.0.1",
        dashboard_port=options.dashboard_port,
        log_to_driver=False,
    )
    try:
        dashboard = f"http://127.0.0.1:{options.dashboard_port}"
        cluster = ServeCluster(dashboard)
        cluster.deploy(config)
        cluster.wait_running(names, _START_TIMEOUT_S)
        address = f"http://{options.host}:{options.port}"
        print(f"serving {', '.join(names)} at {address} (dashboard {dashboard}). A run asks them with")
        print(f"  RL_REWARD_TOKEN=... rl-system train ... reward.url={address}", flush=True)
        ended.wait()
        print("ending the servers", flush=True)
        serve.shutdown()
    finally:
        ray.shutdown()


def _status(options: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.table import Table

    from rl_system.serve_config import ServeCluster

    table = Table("application", "status", "range", "replicas", "live settings")
    for name, now in ServeCluster(options.address).status().items():
        replicas = "\n".join(f"{r['state']} pid {r['pid']} @ {r['node_ip']}" for r in now["replicas"])
        least, most = now["range"]
        said = now["status"] + (f"\n{now['message']}" if now["message"] else "")
        settings = "\n".join(f"{key}={value}" for key, value in now["settings"].items())
        table.add_row(name, said, str(least) if least == most else f"{least} to {most}", replicas, settings)
    Console().print(table)


def _scale(options: argparse.Namespace) -> None:
    from rl_system.serve_config import ServeCluster

    most = options.least if options.most is None else options.most
    ServeCluster(options.address).scale(options.app, options.least, most)
    print(f"{options.app}: {options.least} to {most} replicas")


def _set(options: argparse.Namespace) -> None:
    from rl_system.serve_config import ServeCluster

    settings = {}
    for given in options.settings:
        key, equals, value = given.partition("=")
        if not equals:
            raise ValueError(f"{given} is no KEY=VALUE")
        try:
            settings[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ValueError(f"{given}: the value is no YAML: {' '.join(str(error).split())}") from None
    ServeCluster(options.address).set_live(options.app, settings)
    print(f"{options.app}: {', '.join(options.settings)}")
