"""KubeRay's custom resource definitions as strict JSON Schemas.

The API server drops fields that it does not know; here they are refused. Not covered: the CRDs' CEL rules.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import yaml

from rl_system.k8s.manifests import Manifest, Problem, pods

KINDS = ("RayCluster", "RayJob", "RayService")
_SERVER_ONLY = {"description", "format", "nullable", "example", "externalDocs"}


class Schemas:
    """Validators of the KubeRay kinds.

    Args:
        folder: with the CRDs as YAML, as in KubeRay's ``helm-chart/kuberay-operator/crds``.

    Raises:
        ValueError: the folder lacks one of the kinds.
    """

    def __init__(self, folder: Path) -> None:
        self._roots: dict[str, dict[str, Any]] = {}
        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
        for file in sorted(folder.glob("*.yaml")):
            crd = yaml.load(file.read_text(), Loader=loader)
            if isinstance(crd, dict) and crd.get("kind") == "CustomResourceDefinition":
                (version,) = (v for v in crd["spec"]["versions"] if v["name"] == "v1")
                self._roots[crd["spec"]["names"]["kind"]] = version["schema"]["openAPIV3Schema"]
        missing = [kind for kind in KINDS if kind not in self._roots]
        if missing:
            raise ValueError(f"--crds {folder}: no CRD of {', '.join(missing)} there (ray.io_*.yaml of KubeRay)")
        self._validators = {kind: _validator(root) for kind, root in self._roots.items()}
        cluster = self._roots["RayCluster"]["properties"]["spec"]["properties"]
        self._pod = _validator(cluster["headGroupSpec"]["properties"]["template"])

    def problems(self, manifests: list[Manifest]) -> Iterator[Problem]:
        """Everything that the API server would refuse or silently drop."""
        for manifest in manifests:
            if validator := self._validators.get(manifest.kind):
                for error in validator.iter_errors(manifest.doc):
                    yield _problem(manifest, "", error)
                for path, key in _duplicates(self._roots[manifest.kind], manifest.doc):
                    yield manifest.problem(path, f"two entries with {key}", "keep one, or rename the other")
        for pod in pods(manifests):
            if pod.manifest.kind not in self._validators:  # those are covered above
                for error in self._pod.iter_errors(pod.template):
                    yield _problem(pod.manifest, pod.path, error)


def _validator(root: dict[str, Any]) -> Any:
    return jsonschema.Draft202012Validator(_strict(root) | ({"required": ["spec"]} if "spec" in root else {}))


def _strict(schema: dict[str, Any]) -> dict[str, Any]:
    """A structural schema as JSON Schema that refuses unknown fields."""
    out = {k: v for k, v in schema.items() if k not in _SERVER_ONLY and not k.startswith("x-kubernetes-")}
    properties = schema.get("properties", {})
    if properties:
        out["properties"] = {name: _strict(inner) for name, inner in properties.items()}
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            out.setdefault("additionalProperties", False)
        if properties.get("metadata") == {"type": "object"}:
            out["properties"]["metadata"] = {"type": "object"}  # the API server's own schema, not the CRD's
    for key in ("items", "additionalProperties"):
        if isinstance(out.get(key), dict):
            out[key] = _strict(schema[key])
    if schema.get("x-kubernetes-int-or-string"):
        out.pop("type", None)
        out.setdefault("anyOf", [{"type": "integer"}, {"type": "string"}])
    if "required" in out:  # the server fills defaults before it validates
        out["required"] = [name for name in out["required"] if "default" not in properties.get(name, {})]
    if schema.get("nullable") and "type" in out:
        out["type"] = [out["type"], "null"]
    if schema.get("format") == "int32":
        out.setdefault("minimum", -(2**31))
        out.setdefault("maximum", 2**31 - 1)
    return out


def _problem(manifest: Manifest, prefix: str, error: jsonschema.ValidationError) -> Problem:
    path = prefix + error.json_path.removeprefix("$")
    path = path.lstrip(".") or "."
    if error.validator == "additionalProperties":
        allowed = list(error.schema["properties"])
        unknown = sorted(set(error.instance) - set(allowed))
        close = difflib.get_close_matches(unknown[0], allowed, 1)
        fix = f"did you mean {close[0]}?" if close else f"known here: {', '.join(allowed[:12])}"
        return manifest.problem(path, f"unknown field {', '.join(unknown)}", fix)
    if error.validator == "required":
        return manifest.problem(path, error.message, "add the field")
    if error.validator == "type":
        return manifest.problem(path, f"{error.instance!r} is no {error.validator_value}", _quote_hint(error))
    return manifest.problem(path, error.message[:200], f"allowed: {str(error.validator_value)[:120]}")


def _quote_hint(error: jsonschema.ValidationError) -> str:
    if error.validator_value == "string" and not isinstance(error.instance, dict | list):
        return f'write it in quotes: "{error.instance}"'
    return f"write a value of type {error.validator_value}"


def _duplicates(schema: dict[str, Any], value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Entries of keyed lists that share their key."""
    if isinstance(value, dict):
        for name, inner in value.items():
            known = schema.get("properties", {}).get(name) or schema.get("additionalProperties")
            if isinstance(known, dict):
                yield from _duplicates(known, inner, f"{path}.{name}".lstrip("."))
    elif isinstance(value, list):
        items = schema.get("items", {})
        keys = schema.get("x-kubernetes-list-map-keys", [])
        seen = set()
        for index, entry in enumerate(value):
            defaults = {k: items.get("properties", {}).get(k, {}).get("default") for k in keys}
            identity = tuple((k, entry.get(k, defaults[k])) for k in keys)
            if keys and identity in seen:
                yield f"{path}[{index}]", ", ".join(f"{k}={v}" for k, v in identity)
            seen.add(identity)
            yield from _duplicates(items, entry, f"{path}[{index}]")
