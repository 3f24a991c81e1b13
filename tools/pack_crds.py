"""KubeRay's CRDs into the file that ``rl-system k8s check`` reads: their structure, without texts and status.

    python tools/pack_crds.py kuberay/helm-chart/kuberay-operator/crds

From a checkout of the version that ``rl_system.k8s.schemas.VERSION`` names.
"""

from __future__ import annotations

import json
import lzma
import sys
from pathlib import Path
from typing import Any

from rl_system.k8s.schemas import KINDS, PACKED, read_crds

_TEXTS = ("description", "example", "externalDocs")


def main(folder: str) -> None:
    """Write :data:`PACKED`."""
    roots = read_crds(Path(folder))
    kept = {kind: _structure(roots[kind]) for kind in KINDS}
    PACKED.write_bytes(lzma.compress(json.dumps(kept, sort_keys=True).encode()))
    print(f"{PACKED}: {PACKED.stat().st_size} bytes")


def _structure(root: dict[str, Any]) -> dict[str, Any]:
    kept = _without_texts(root)
    kept["properties"]["status"] = {"type": "object"}
    return kept


def _without_texts(schema: dict[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in schema.items() if key not in _TEXTS}
    if "properties" in schema:  # a field may be called as a text is
        kept["properties"] = {name: _without_texts(inner) for name, inner in schema["properties"].items()}
    for key in ("items", "additionalProperties"):
        if isinstance(schema.get(key), dict):
            kept[key] = _without_texts(schema[key])
    return kept


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
