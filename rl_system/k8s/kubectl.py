"""kubectl against the cluster of the current context; whatever it says goes to the terminal."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

from rl_system.k8s.manifests import RenderError, render_text

NAMESPACE = "rl-system"
"""Of all overlays (k8s/overlays/*/kustomization.yaml)."""
KINDS = "rayjob,raycluster,rayservice,pod"
POOLS = ("submitter", "head", "learner", "rollout", "reward-sam", "reward-vlm", "prefetch")


def apply(folder: Path, dry_run: bool) -> int:
    """Send an overlay; ``dry_run``: the API server only says what it would do. Returns kubectl's exit code."""
    options = ["--dry-run=server"] if dry_run else []
    return _run(["apply", *options, "--filename", "-"], render_text(folder))


def logs(pool: str, follow: bool) -> int:
    """Logs of the pods of a pool (one of :data:`POOLS`); of ``submitter``, what the run prints."""
    options = ["--follow"] if follow else []
    selector = f"app.kubernetes.io/component={pool}"
    return _run(["logs", "--namespace", NAMESPACE, "--selector", selector, "--tail=-1", "--prefix", *options])


def status() -> int:
    """The Ray objects and the pods."""
    return _run(["get", KINDS, "--namespace", NAMESPACE, "--label-columns", "app.kubernetes.io/component"])


def _run(arguments: Sequence[str], text: str | None = None) -> int:
    try:
        return subprocess.run(["kubectl", *arguments], input=text, text=True, check=False).returncode
    except FileNotFoundError:
        raise RenderError("kubectl is not on the PATH") from None
