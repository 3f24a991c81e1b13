"""``rl-system k8s``: render and check the manifests without a cluster; apply them and look, with kubectl."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rl_system.commands import exit_codes
from rl_system.k8s import kubectl
from rl_system.k8s.manifests import RenderError, render_text

OVERLAYS = Path("k8s/overlays")


def run(args: list[str]) -> int:
    """Do one of the actions; returns the exit code: 0 good, 2 bad manifests or input, 1 kubectl failed."""
    options = _parser().parse_args(args)
    try:
        return _do(options)
    except KeyboardInterrupt:
        return exit_codes.INTERRUPTED
    except ValueError as error:
        print(f"rl-system k8s {options.action}: {error}", file=sys.stderr)
        return exit_codes.BAD_INPUT


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("rl-system k8s", description="The Kubernetes manifests (docs/kubernetes.md).")
    actions = parser.add_subparsers(dest="action", required=True)
    render = actions.add_parser("render", help="print what `kubectl apply -k` would send")
    render.add_argument("overlay", metavar="OVERLAY", help="a name in k8s/overlays, or a directory")
    check = actions.add_parser("check", help="look for mistakes; every finding names file, path and fix")
    check.add_argument("overlay", metavar="OVERLAY", nargs="?", help="a name in k8s/overlays, or a directory; all")
    check.add_argument("--crds", metavar="DIR", type=Path, help="KubeRay's CRDs, to find misspelt fields too")
    submit = actions.add_parser("submit", help="check, then `kubectl apply` to the current context")
    submit.add_argument("overlay", metavar="OVERLAY", help="a name in k8s/overlays, or a directory")
    submit.add_argument("--crds", metavar="DIR", type=Path, help="as for check")
    submit.add_argument("--dry-run", action="store_true", help="the API server says what it would do, and does nothing")
    logs = actions.add_parser("logs", help="what the run prints, or the pods of another pool")
    logs.add_argument("pool", metavar="POOL", nargs="?", default="submitter", choices=kubectl.POOLS, help="submitter")
    logs.add_argument("--follow", action="store_true", help="go on as more comes")
    actions.add_parser("status", help="the Ray objects and the pods")
    return parser


def _do(options: argparse.Namespace) -> int:
    if options.action == "render":
        print(render_text(_folder(options.overlay)), end="")
        return exit_codes.OK
    if options.action == "logs":
        return _passed_on(kubectl.logs(options.pool, options.follow))
    if options.action == "status":
        return _passed_on(kubectl.status())
    checked = _check(options.overlay, options.crds)
    if options.action == "check" or checked != exit_codes.OK:
        return checked
    return _passed_on(kubectl.apply(_folder(options.overlay), options.dry_run))


def _passed_on(code: int) -> int:
    return exit_codes.OK if code == 0 else exit_codes.ERROR


def _check(name: str | None, crds: Path | None) -> int:
    from rl_system.k8s.checks import check
    from rl_system.k8s.schemas import Schemas

    folders = [_folder(name)] if name else sorted(p.parent for p in OVERLAYS.glob("*/kustomization.yaml"))
    if not folders:
        raise RenderError(f"no overlay in {OVERLAYS.resolve()}; name a directory, or call it from the repository root")
    schemas = Schemas(crds) if crds else None
    code = exit_codes.OK
    for folder in folders:
        manifests, problems = check(folder, schemas)
        for problem in problems:
            print(problem, file=sys.stderr)
            code = exit_codes.BAD_INPUT
        if not problems:
            by = "CRDs, operator's rules" if schemas else "operator's rules (no CRDs given: --crds)"
            print(f"{folder}: good: {len(manifests)} objects by {by}, pods, and places of the experiment")
    return code


def _folder(overlay: str) -> Path:
    named = OVERLAYS / overlay
    return named if named.is_dir() else Path(overlay)
