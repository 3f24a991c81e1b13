"""Who worked on a run, where: one line for each attempt."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rl_system.runs.directory import RunDirectory
from rl_system.runs.files import JsonLines, read_json_lines

JOB_CONFIG = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Where `ray job submit` leaves the id and the metadata of the job for its program."""


def note_attempt(run: RunDirectory, context: Any) -> None:
    """Append this attempt to ``attempts.jsonl``, and link Ray's logs into ``logs/``; Ray must be connected.

    The line: ``started_s`` (epoch), ``host``, ``pid``, ``ray`` (address of the cluster), ``dashboard`` (empty without
    one), ``metrics`` (Prometheus endpoint of the driver's node), ``submission_id`` and ``metadata`` of a Ray job.

    Args:
        context: of ``ray.init``.
    """
    import ray

    logs = run.logs / "ray"
    logs.unlink(missing_ok=True)
    logs.symlink_to(Path(context.address_info["session_dir"]) / "logs")
    here = ray.get_runtime_context().get_node_id()
    node = next(node for node in ray.nodes() if node["NodeID"] == here)
    submission, metadata = _job(os.environ)
    lines = JsonLines(run.attempts)
    lines.append(
        {
            "started_s": time.time(),
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "ray": context.address_info["gcs_address"],
            "dashboard": context.dashboard_url or "",
            "metrics": f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics",
            "submission_id": submission,
            "metadata": metadata,
        }
    )
    lines.close()


def read_attempts(run: RunDirectory) -> list[dict[str, Any]]:
    """What :func:`note_attempt` wrote, oldest first."""
    return list(read_json_lines(run.attempts))


def _job(environment: Mapping[str, str]) -> tuple[str, dict[str, str]]:
    """Submission id and the user's metadata; empty outside of a Ray job."""
    metadata = json.loads(environment.get(JOB_CONFIG) or "{}").get("metadata", {})
    ray_own = ("job_submission_id", "job_name")
    return metadata.get("job_submission_id", ""), {k: v for k, v in metadata.items() if k not in ray_own}
