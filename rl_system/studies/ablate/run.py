"""Runs the stages of a study, each once, in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from rl_system.runs.files import write_atomic, write_json
from rl_system.studies.ablate.plan import Plan, Stage, policy_directory
from rl_system.studies.ablate.settings import AblateConfig

_COMMAND = (sys.executable, "-m", "rl_system")
_TAIL = 12
"""Lines of a failed stage's output that are shown."""


class StageFailed(Exception):
    """A stage ended with an error. ``code`` is its exit code."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


def write_layouts(config: AblateConfig, plan: Plan) -> None:
    """A policy directory for each layout: its own configuration, and links to weights and tokenizer."""
    source = Path(config.policy)
    for name, blocks in plan.layouts.items():
        directory = policy_directory(config, name)
        directory.mkdir(parents=True, exist_ok=True)
        record = json.loads((source / "config.json").read_text())
        record["layout"]["blocks"] = list(blocks)
        for path in (source / "tokenizer.json", *source.glob("*.safetensors*")):
            link = directory / path.name
            link.unlink(missing_ok=True)
            link.symlink_to(path.resolve())
        write_json(directory / "config.json", record)


def run_stages(config: AblateConfig, plan: Plan, say: Callable[[str], None]) -> None:
    """Run what is not done yet; what a stage prints goes to ``logs/STAGE.log``.

    Raises:
        StageFailed: naming the command, its log and its last lines.
        ValueError: a stage was done by another command, so the study was begun with other settings.
    """
    done, logs = Path(config.output) / "done", Path(config.output) / "logs"
    for folder in (done, logs):
        folder.mkdir(parents=True, exist_ok=True)
    for stage in plan.stages:
        _check_done(done / f"{stage.name}.json", stage)
    for number, stage in enumerate(plan.stages, 1):
        marker = done / f"{stage.name}.json"
        if marker.exists():
            continue
        say(f"[{number}/{len(plan.stages)}] {stage.name}")
        started = time.monotonic()
        _run(stage, logs / f"{stage.name}.log")
        write_json(marker, {"command": list(stage.command), "seconds": round(time.monotonic() - started, 1)})


def _check_done(marker: Path, stage: Stage) -> None:
    if not marker.exists():
        return
    before = json.loads(marker.read_text())["command"]
    if before != list(stage.command):
        changed = [a for a in stage.command if a not in before] or [a for a in before if a not in stage.command]
        raise ValueError(
            f"{marker.parent.parent} was begun with other settings: {stage.name} is done, but not with "
            f"{' '.join(changed)}; choose another output, or delete {marker} and what it made"
        )


def _run(stage: Stage, log: Path) -> None:
    command = [*_COMMAND, *stage.command]
    environment = os.environ | {"RAY_AUTH_MODE": os.environ.get("RAY_AUTH_MODE", "disabled")}
    with log.open("w") as output:
        code = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, env=environment).returncode
    if code:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-_TAIL:])
        write_atomic(log.with_suffix(".command"), " ".join(["rl-system", *stage.command]) + "\n")
        raise StageFailed(f"{stage.name} ended with {code}; its output is in {log}, at the end:\n{tail}", code)
