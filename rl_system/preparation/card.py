"""The data card of a prepared folder: ``card.json`` with counts and histograms, ``card.html`` with pictures."""

from __future__ import annotations

import io
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from rl_system.preparation.plan import Skipped
from rl_system.preparation.settings import PrepareConfig, identity
from rl_system.runs.files import write_atomic, write_json
from rl_system.runs.pictures import PictureInliner
from vlcot.degradation.text import components
from vlcot.images import area_downscale, upscale_for_policy

BINS = 12
_SAMPLES = 8
_PICTURE_BYTES = 3_000_000
_READ = ("degradation", "record", "coarse", "middle", "fine", "objects", "prompt_tokens", "answer_tokens")
_POSITIONS = ("blur", "resize", "noise", "compression")


def write_card(config: PrepareConfig, files: Sequence[Path], skipped: Sequence[Skipped]) -> None:
    """Write both files from the shards ``files`` into the output folder."""
    columns: dict[str, list[Any]] = {name: [] for name in _READ}
    for file in files:
        table = pq.read_table(file, columns=list(_READ))
        for name in _READ:
            columns[name] += table[name].to_pylist()
    sections = {
        "Degradation parameters": _parameters([json.loads(text) for text in columns["record"]]),
        "Degradation in words": _words(columns["degradation"]),
        "Texts and tokens": _lengths(columns),
    }
    counts = {
        "rows": len(columns["record"]),
        "shards": len(files),
        "left_out": len(skipped),
        "tokens": sum(columns["prompt_tokens"]) + sum(columns["answer_tokens"]),
        "rows_with_objects": sum(bool(names) for names in columns["objects"]),
    }
    output = Path(config.output)
    write_json(output / "card.json", {"counts": counts, "histograms": sections})
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).with_name("templates")), autoescape=True, undefined=StrictUndefined
    )
    html = environment.get_template("card.html.j2").render(
        counts=counts,
        samples=_samples(files, counts["rows"]),
        sections={title: [(name, _bars(h)) for name, h in part.items()] for title, part in sections.items()},
        skipped=skipped,
        settings=yaml.safe_dump(identity(config), sort_keys=True),
    )
    write_atomic(output / "card.html", html)


def histogram(values: Sequence[Any]) -> dict[str, Any]:
    """Counts: of every value of words and switches, of at most ``BINS`` equal bins (``edges``) of numbers."""
    if values and isinstance(values[0], float | int) and not isinstance(values[0], bool):
        bins: Any = BINS
        if all(isinstance(value, int) for value in values):  # equal bins hold equally many whole numbers
            width = -(-(max(values) - min(values) + 1) // BINS)
            bins = np.arange(min(values), max(values) + width + 1, width) - 0.5
        numbers, edges = np.histogram(np.array(values, dtype=np.float64), bins=bins)
        return {"edges": [float(edge) for edge in edges], "counts": numbers.tolist()}
    found = Counter(str(value) for value in values)
    return {"values": sorted(found), "counts": [found[value] for value in sorted(found)]}


def _parameters(records: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Every parameter of the records; seeds, sizes and what a record does not have are left out."""
    found: dict[str, list[Any]] = {}
    for record in records:
        for name, value in _drawn(record):
            found.setdefault(name, []).append(value)
    return {name: histogram(found[name]) for name in sorted(found)}


def _drawn(record: Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
    for number in (1, 2):
        stage, where = record[f"stage{number}"], f"stage {number}"
        yield from _kernel(stage["blur"], f"{where} blur")
        resize, noise = stage["resize"], stage["noise"]
        yield f"{where} resize direction", resize["direction"]
        yield f"{where} resize mode", resize["mode"]
        if resize["direction"] != "keep":
            yield f"{where} resize factor, {resize['direction']}", resize["factor"]
        yield f"{where} noise kind", noise["kind"]
        yield f"{where} noise level, {noise['kind']}", noise["level"]
        yield f"{where} gray noise", noise["gray"]
        yield f"{where} JPEG quality", stage["jpeg_quality"]
    yield from _kernel(record["final_sinc"], "final sinc")
    yield "final resize mode", record["final_mode"]
    yield "JPEG last", record["jpeg_last"]


def _kernel(kernel: Mapping[str, Any] | None, where: str) -> Iterable[tuple[str, Any]]:
    yield f"{where} kind", "none" if kernel is None else kernel["kind"]
    if kernel is None:
        return
    yield f"{where} size", str(kernel["size"]).rjust(2)
    if kernel["kind"] == "sinc":
        yield f"{where} omega", kernel["omega"]
        return
    yield f"{where} sigma x", kernel["sigma_x"]
    if kernel["kind"].endswith("aniso"):
        yield f"{where} sigma y", kernel["sigma_y"]
        yield f"{where} rotation", kernel["rotation"]
    if kernel["kind"].startswith(("generalized", "plateau")):
        yield f"{where} beta, {kernel['kind'].split('_')[0]}", kernel["beta"]


def _words(texts: Sequence[str]) -> dict[str, Any]:
    said = [parts for parts in map(components, texts) if parts is not None]
    return {
        f"stage {1 + place // 4} {_POSITIONS[place % 4]}": histogram([parts[place] for parts in said])
        for place in range(2 * len(_POSITIONS))
    }


def _lengths(columns: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    found: dict[str, Sequence[Any]] = {
        f"words of the {name} text": [len(t.split()) for t in columns[name]] for name in ("coarse", "middle", "fine")
    }
    found |= {name.replace("_", " "): columns[name] for name in ("prompt_tokens", "answer_tokens")}
    found["main objects"] = [len(names) for names in columns["objects"] if names is not None]
    return {name: histogram(values) for name, values in found.items() if values}


def _samples(files: Sequence[Path], rows: int) -> list[dict[str, Any]]:
    """Rows spread evenly over the folder, with their pictures."""
    wanted = {round(i * (rows - 1) / max(1, min(_SAMPLES, rows) - 1)) for i in range(min(_SAMPLES, rows))}
    inliner, samples, start = PictureInliner(_PICTURE_BYTES), [], 0
    for file in files:
        count = pq.read_metadata(file).num_rows
        here = sorted(index - start for index in wanted if start <= index < start + count)
        if here:
            for row in pq.read_table(file).take(here).to_pylist():
                samples.append(row | {"pictures": _pictures(row, inliner)})
        start += count
    return samples


def _pictures(row: Mapping[str, Any], inliner: PictureInliner) -> list[tuple[str, str]]:
    target, lr = (np.asarray(Image.open(io.BytesIO(row[name]))) for name in ("target", "lr"))
    size = target.shape[0]
    pictures = {"LR": lr, "LR as the policy sees it": upscale_for_policy(lr, size)}
    pictures |= {"coarse": area_downscale(target, size // 4), "middle": area_downscale(target, size // 2)}
    return [(label, inliner.inline(image)) for label, image in (pictures | {"final": target}).items()]


def _bars(histogram: Mapping[str, Any]) -> Markup:
    """A small bar chart; labels are the values, or the ends of the range."""
    counts = histogram["counts"]
    width, height = 260, 92
    step, most = width / max(1, len(counts)), max(counts, default=1) or 1
    parts = [Markup('<svg viewBox="0 0 {} {}" role="img">').format(width, height + 26)]
    for place, count in enumerate(counts):
        tall = height * count / most
        parts.append(
            Markup('<rect x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}"><title>{}</title></rect>').format(
                place * step, height - tall, max(1.0, step - 2), tall, count
            )
        )
    labels = histogram.get("values")
    if labels is None:
        edges = histogram["edges"]
        ends = (0.0, "start", edges[0]), (float(width), "end", edges[-1])
        parts += [_label(x, height + 12, anchor, f"{edge:.4g}") for x, anchor, edge in ends]
    else:
        rows = 2 if len(labels) > math.floor(width / 52) else 1
        for place, label in enumerate(labels):
            x = place * step + step / 2
            parts.append(_label(x, height + 12 + 11 * (place % rows), "middle", f"{label}"[:16]))
    return Markup("").join([*parts, Markup("</svg>")])


def _label(x: float, y: float, anchor: str, text: str) -> Markup:
    return Markup('<text x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>').format(x, y, anchor, text)
