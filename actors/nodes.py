"""What the nodes of the Ray cluster offer, chosen by their labels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import ray


def offered(labels: Mapping[str, str]) -> dict[str, float]:
    """Resources of the living nodes that carry all of ``labels``, added up; empty ``labels``: of all nodes.

    Raises:
        ValueError: no living node carries them.
    """
    alive = [node for node in ray.nodes() if node["Alive"]]
    chosen = [node for node in alive if labels.items() <= node["Labels"].items()]
    if labels and not chosen:
        there = sorted({f"{key}={node['Labels'][key]}" for node in alive for key in labels if key in node["Labels"]})
        raise ValueError(f"no node of the cluster has the label {said(labels)}; there is {', '.join(there) or 'none'}")
    total: Counter[str] = Counter()
    for node in chosen:
        total.update(node["Resources"])
    return dict(total)


def said(labels: Mapping[str, str]) -> str:
    """``rl.io/pool=rollout``, for messages."""
    return ", ".join(f"{key}={value}" for key, value in labels.items())
