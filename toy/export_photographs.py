"""The toy's crops as a folder with captions, for `make data-demo`: `python -m toy.export_photographs DIR`.

With ``--captions-of FOLDER`` it exports nothing, but writes a captions file for the images of that folder: placeholders
that say only that it is a photograph, so that the demo runs without a captioner. They are nothing to train on.
With ``--pairs N`` it also exports N held-out crops with their degraded images, for `make ablate-demo`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from PIL import Image

from toy.photographs import crop
from toy.rows import row

PLACEHOLDER = {"coarse": "a photograph", "middle": "a photograph with objects", "fine": "objects, surfaces and light"}


def export(folder: Path, count: int, seed: int) -> None:
    """Write ``photographs/NAME/NUMBER.png``, and ``captions.jsonl`` with captions and objects."""
    lines = []
    for index in range(count):
        sample = crop(index, "train", seed)
        name = f"{sample.photograph}/{index:05d}.png"
        path = folder / "photographs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(sample.image).save(path)
        objects = list(dict.fromkeys(item.name for item in sample.objects))
        lines.append({"image": name, **vars(sample.captions), "objects": objects})
    _write(folder / "captions.jsonl", lines)


def export_pairs(folder: Path, count: int, seed: int) -> None:
    """Write ``test/lr/NUMBER.png`` and ``test/hr/NUMBER.png``, of the held-out split."""
    for index in range(count):
        held_out = row(index, "heldout", seed)
        for name, image in (("lr", held_out.lr), ("hr", held_out.hq)):
            path = folder / "test" / name / f"{index:05d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)


def placeholders(images: Path, path: Path) -> None:
    """Write a captions file for every PNG below ``images``."""
    names = sorted(p.relative_to(images).as_posix() for p in images.rglob("*.png"))
    _write(path, [{"image": name, **PLACEHOLDER, "objects": []} for name in names])


def _write(path: Path, lines: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--captions-of", type=Path)
    parser.add_argument("--pairs", type=int, default=0)
    args = parser.parse_args()
    if args.captions_of:
        placeholders(args.captions_of, args.folder / "captions.jsonl")
    else:
        export(args.folder, args.count, args.seed)
        export_pairs(args.folder, args.pairs, args.seed)


if __name__ == "__main__":
    main()
