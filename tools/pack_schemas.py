"""The schemas that ``rl-system k8s check`` reads, packed: structure without texts.

    python tools/pack_schemas.py crds kuberay/helm-chart/kuberay-operator/crds
    python tools/pack_schemas.py core kubernetes_validate/kubernetes-json-schema/v1.33.0-local-strict

The first from a checkout of KubeRay, the second from the package kubernetes-validate (Kubernetes' own OpenAPI
description as JSON Schema), in the versions that ``rl_system.k8s.schemas`` names; both under Apache-2.0.
"""

from __future__ import annotations

import json
import lzma
import sys
from pathlib import Path
from typing import Any

from rl_system.k8s.schemas import CORE, CORE_KINDS, KINDS, PACKED, read_crds

_TEXTS = ("description", "example", "externalDocs", "$schema", "$id")
_POINTER = "#/$defs/"


def pack_crds(folder: Path) -> None:
    """Write :data:`PACKED`: kind -> schema."""
    roots = read_crds(folder)
    kept = {kind: _without_texts(roots[kind]) for kind in KINDS}
    for root in kept.values():
        root["properties"]["status"] = {"type": "object"}
    _write(PACKED, kept)


def pack_core(folder: Path) -> None:
    """Write :data:`CORE`: one schema with the definitions of :data:`CORE_KINDS` and all that they refer to."""
    given = json.loads((folder / "_definitions.json").read_text())["$defs"]
    names = {f"{version}/{kind}": _name(given, version, kind) for version, kind in CORE_KINDS}
    kept: dict[str, Any] = {}
    wanted = list(names.values())
    while wanted:
        name = wanted.pop()
        if name not in kept:
            kept[name] = _without_texts(given[name])
            wanted += _references(kept[name])
    _write(CORE, {"kinds": names, "$defs": kept})


def _name(definitions: dict[str, Any], api_version: str, kind: str) -> str:
    group, _, version = api_version.rpartition("/")
    wanted = {"group": group, "version": version, "kind": kind}
    (name,) = (n for n, d in definitions.items() if wanted in d.get("x-kubernetes-group-version-kind", []))
    return name


def _without_texts(schema: dict[str, Any]) -> dict[str, Any]:
    kept = {k: v for k, v in schema.items() if k not in _TEXTS}
    if "$ref" in kept:
        kept["$ref"] = _POINTER + kept["$ref"].partition(_POINTER)[2]
    if "properties" in schema:  # a field may be called as a text is
        kept["properties"] = {name: _without_texts(inner) for name, inner in schema["properties"].items()}
    for key in ("items", "additionalProperties"):
        if isinstance(schema.get(key), dict):
            kept[key] = _without_texts(schema[key])
    return kept


def _references(schema: Any) -> list[str]:
    if isinstance(schema, dict):
        own = [schema["$ref"].removeprefix(_POINTER)] if isinstance(schema.get("$ref"), str) else []
        return own + [name for inner in schema.values() for name in _references(inner)]
    return [name for inner in schema for name in _references(inner)] if isinstance(schema, list) else []


def _write(file: Path, content: dict[str, Any]) -> None:
    file.write_bytes(lzma.compress(json.dumps(content, sort_keys=True).encode()))
    print(f"{file}: {file.stat().st_size} bytes")


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in ("crds", "core"):
        sys.exit(__doc__)
    (pack_crds if sys.argv[1] == "crds" else pack_core)(Path(sys.argv[2]))
