"""All checks of an overlay."""

from __future__ import annotations

from pathlib import Path

from rl_system.k8s import placement, pod_rules, ray_rules
from rl_system.k8s.manifests import Manifest, Problem, render
from rl_system.k8s.schemas import Schemas


def check(overlay: Path, schemas: Schemas | None = None) -> tuple[list[Manifest], list[Problem]]:
    """Render an overlay and look for mistakes; the rendered objects and what is wrong with them.

    Places are only looked for when everything else is sound.

    Args:
        overlay: directory with a ``kustomization.yaml``.
        schemas: KubeRay's CRDs; without them misspelt fields of Ray's kinds go unseen.

    Raises:
        RenderError: kustomize refuses the overlay.
    """
    manifests = render(overlay)
    found = list(schemas.problems(manifests)) if schemas else []
    found += [*ray_rules.problems(manifests), *pod_rules.problems(manifests)]
    return manifests, found or list(placement.problems(manifests))
