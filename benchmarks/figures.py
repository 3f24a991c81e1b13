"""What every benchmark does with its figures."""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch


def machine() -> str:
    """The machine that absolute times belong to."""
    return f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}"


def output_option(parser: argparse.ArgumentParser, name: str) -> None:
    """``--output``, by default ``benchmarks/results/NAME.json``."""
    parser.add_argument("--output", type=Path, default=Path(f"benchmarks/results/{name}.json"))


def write(path: Path, figures: Mapping[str, Any]) -> None:
    """Into the file and onto the screen."""
    text = json.dumps(figures, indent=2)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n", encoding="utf-8")
    print(text)
