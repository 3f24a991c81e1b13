"""What an evaluation leaves: a folder that is there whole or not at all."""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rl_system.runs.files import new_folder, write_atomic, write_json
from rl_system.studies.evaluate.scoring import Scores
from rl_system.studies.evaluate.tables import Table, to_html, to_latex, to_markdown
from vlcot.metrics import METRICS


def write_results(
    output: Path,
    scores: Sequence[Scores],
    table: Table,
    missing: Mapping[str, Sequence[str]],
    weights: Mapping[str, Path],
) -> None:
    """Write per_image.csv, scores.json, table.md, table.tex and table.html to ``output``, which must not exist.

    Raises:
        OSError: ``output`` cannot be written; nothing is left behind.
    """
    with new_folder(output) as folder:
        write_atomic(folder / "per_image.csv", _csv(scores))
        write_json(folder / "scores.json", _record(scores, missing, weights))
        write_atomic(folder / "table.md", to_markdown(table))
        write_atomic(folder / "table.tex", to_latex(table))
        write_atomic(folder / "table.html", to_html(table))


def _csv(scores: Sequence[Scores]) -> str:
    """A line per image in full precision; a metric that was not computed is an empty field."""
    names = [name for name, metric in METRICS.items() if not metric.compares_folders]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["data_set", "method", "image", *names])
    for score in scores:
        for image, values in score.images.items():
            writer.writerow([score.data_set, score.method, image, *(values.get(name, "") for name in names)])
    return text.getvalue()


def _record(
    scores: Sequence[Scores], missing: Mapping[str, Sequence[str]], weights: Mapping[str, Path]
) -> dict[str, Any]:
    return {
        "scores": [
            {"data_set": s.data_set, "method": s.method, "means": dict(s.means), "images": dict(s.images)}
            for s in scores
        ],
        "not_computed": {metric: {"missing_weights": list(files)} for metric, files in missing.items()},
        "weights": {name: {"path": str(path), "sha256": _sha256(path)} for name, path in sorted(weights.items())},
    }


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
