"""Rendered manifests, each with the file that it came from."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ORIGIN = "config.kubernetes.io/origin"
CLUSTER_AT = {"RayCluster": ("spec",), "RayJob": ("spec", "rayClusterSpec"), "RayService": ("spec", "rayClusterConfig")}
POD_AT = {
    "Job": ("spec", "template"),
    "Deployment": ("spec", "template"),
    "StatefulSet": ("spec", "template"),
    "RayJob": ("spec", "submitterPodTemplate"),
}
SETTINGS = "settings"


class RenderError(ValueError):
    """kustomize refuses the overlay, or there is none; the message is its own."""


@dataclass(frozen=True)
class Problem:
    """One finding: where it is, what is wrong, what would be right."""

    file: str
    path: str
    wrong: str
    fix: str

    def __str__(self) -> str:
        return f"{self.file}: {self.path}: {self.wrong}; {self.fix}"


@dataclass(frozen=True)
class Manifest:
    """One object and the file that it came from."""

    doc: dict[str, Any]
    file: str

    @property
    def kind(self) -> str:
        """For example ``RayJob``."""
        return str(self.doc.get("kind"))

    @property
    def name(self) -> str:
        """``metadata.name``."""
        return str((self.doc.get("metadata") or {}).get("name", ""))

    def problem(self, path: str, wrong: str, fix: str) -> Problem:
        """A finding in this object."""
        return Problem(self.file, f"{self.kind} {self.name}: {path}", wrong, fix)


@dataclass(frozen=True)
class Pod:
    """A pod template and its place. ``group``: of a Ray cluster, ``head`` or the worker group's name."""

    manifest: Manifest
    path: str
    template: dict[str, Any]
    group: str | None

    @property
    def spec(self) -> dict[str, Any]:
        """The pod spec."""
        return self.template.get("spec") or {}

    @property
    def labels(self) -> dict[str, str]:
        """Labels of the pod."""
        return (self.template.get("metadata") or {}).get("labels") or {}


@dataclass(frozen=True)
class RayClusterSpec:
    """The cluster inside a RayCluster, RayJob or RayService, and its place."""

    manifest: Manifest
    path: str
    spec: dict[str, Any]

    def groups(self) -> Iterator[tuple[str, str, dict[str, Any]]]:
        """Name, path and spec of each group; the head's is ``head``."""
        if self.spec.get("headGroupSpec"):
            yield "head", f"{self.path}.headGroupSpec", self.spec["headGroupSpec"]
        for index, group in enumerate(self.spec.get("workerGroupSpecs") or []):
            yield str(group.get("groupName")), f"{self.path}.workerGroupSpecs[{index}]", group


def render_text(overlay: Path) -> str:
    """What ``kubectl apply -k`` would send.

    Raises:
        RenderError: no kubectl, no such overlay, or kustomize refuses it.
    """
    if not (overlay / "kustomization.yaml").is_file():
        raise RenderError(f"{overlay}: no overlay there ({overlay}/kustomization.yaml does not exist)")
    try:
        done = subprocess.run(["kubectl", "kustomize", str(overlay)], capture_output=True, text=True, timeout=60)
    except FileNotFoundError:
        raise RenderError(
            "kubectl is not on the PATH: it brings the kustomize that renders (tried with 1.32)"
        ) from None
    if done.returncode:
        reason = " ".join(done.stderr.replace("\\", "").replace('"', "").split()).removeprefix("error: ")
        reason = reason.rpartition(" command failed err=")[2]  # after the log prefix of newer clients
        raise RenderError(f"{overlay}/kustomization.yaml: kustomize: {reason}; correct the file or key that it names")
    return done.stdout


def render(overlay: Path) -> list[Manifest]:
    """The objects of an overlay, each with its source file.

    Raises:
        RenderError: as :func:`render_text`.
    """
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder).resolve()
        inside = os.path.relpath(overlay.resolve(), root)
        around = {"resources": [inside], "buildMetadata": ["originAnnotations"]}
        (root / "kustomization.yaml").write_text(yaml.safe_dump(around))
        try:
            text = render_text(root)
        except RenderError:
            render_text(overlay)  # says the same about the overlay's own files
            raise
        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
        docs = [doc for doc in yaml.load_all(text, Loader=loader) if doc]
        return [Manifest(doc, _origin(doc, root)) for doc in docs]


def _origin(doc: dict[str, Any], root: Path) -> str:
    annotations = doc["metadata"].pop("annotations", {})
    origin = yaml.safe_load(annotations.pop(ORIGIN))
    path = (root / (origin.get("path") or origin["configuredIn"])).resolve()  # configuredIn: of what was generated
    if annotations:
        doc["metadata"]["annotations"] = annotations
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def clusters(manifests: list[Manifest]) -> Iterator[RayClusterSpec]:
    """The Ray clusters in ``manifests``."""
    for manifest in manifests:
        if at := CLUSTER_AT.get(manifest.kind):
            yield RayClusterSpec(manifest, ".".join(at), _at(manifest.doc, at))


def pods(manifests: list[Manifest]) -> Iterator[Pod]:
    """All pod templates in ``manifests``."""
    for manifest in manifests:
        if (at := POD_AT.get(manifest.kind)) and (template := _at(manifest.doc, at)):
            yield Pod(manifest, ".".join(at), template, None)
    for cluster in clusters(manifests):
        for name, path, group in cluster.groups():
            yield Pod(cluster.manifest, f"{path}.template", group.get("template") or {}, name)


def settings(manifests: list[Manifest]) -> Manifest | None:
    """The overlay's ConfigMap ``settings``."""
    return next((m for m in manifests if m.kind == "ConfigMap" and m.name == SETTINGS), None)


def _at(doc: dict[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    for key in keys:
        doc = doc.get(key) or {}
    return doc
