"""Make the pictures of the README from finished runs: `python tools/readme_pictures.py RUN [RUN ...]`.

`docs/images/restorations.png` shows held-out photographs of the first run, `docs/images/rewards.png` rewards of all.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image

from rl_system.runs.directory import RunDirectory
from rl_system.runs.evaluation_files import StoredEvaluation, read_evaluation
from rl_system.runs.pictures import read_png
from vlcot.rewards import COMPONENTS

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # the backend is chosen before

COLUMNS = ("LR", "bicubic", "coarse", "middle", "final, before", "final, after", "ground truth")
WINDOW = 8
"""Steps of the moving mean."""


def restorations(before: StoredEvaluation, after: StoredEvaluation, count: int, path: Path) -> None:
    """Strips of the first `count` prompts with complete chains at both moments; below, the coarse text of `after`."""
    figure, axes = plt.subplots(count, len(COLUMNS), figsize=(len(COLUMNS) * 1.25, count * 1.4), squeeze=False)
    pairs = [(b, a) for b, a in zip(before.prompts, after.prompts, strict=True) if len(b["pictures"]) == 5]
    for axis, title in zip(axes[0], COLUMNS, strict=True):
        axis.set_title(title, fontsize=8)
    for row, (old, new) in zip(axes, [pair for pair in pairs if len(pair[1]["pictures"]) == 5], strict=False):
        lr, hq, coarse, middle, final = (
            read_png(after.folder / new["pictures"][name]) for name in ("lr", "hq", "coarse", "middle", "final")
        )
        bicubic = np.asarray(Image.fromarray(lr).resize(hq.shape[1::-1], Image.Resampling.BICUBIC))
        first = read_png(before.folder / old["pictures"]["final"])
        for axis, image in zip(row, (lr, bicubic, coarse, middle, first, final, hq), strict=True):
            axis.imshow(image, interpolation="nearest")
            axis.set_axis_off()
        row[3].text(0.5, -0.12, f"“{new['texts'][1]}”", transform=row[3].transAxes, ha="center", fontsize=7)
    figure.subplots_adjust(wspace=0.05, hspace=0.15)
    figure.savefig(path, dpi=110, bbox_inches="tight")


def rewards(runs: list[RunDirectory], path: Path) -> None:
    """Moving means of the total and of each reward over the steps, one line per run."""
    names = ("total", *COMPONENTS)
    figure, axes = plt.subplots(1, len(names), figsize=(2.6 * len(names), 2.2), layout="constrained")
    for run in runs:
        lines = [json.loads(line) for line in run.metrics.read_text(encoding="utf-8").splitlines()]
        for axis, name in zip(axes, names, strict=True):
            points = [(r["step"], r[f"reward/{name}"]) for r in lines if r.get(f"reward/{name}") is not None]
            steps, values = np.array(points).T
            window = min(WINDOW, len(values))
            means = np.convolve(values, np.ones(window) / window, mode="valid")
            axis.plot(steps[window - 1 :], means, label=run.name)
            axis.set_title(name, fontsize=9)
            axis.set_xlabel("step", fontsize=8)
            axis.tick_params(labelsize=7)
    axes[0].legend(fontsize=7)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--photographs", type=int, default=6)
    parser.add_argument("--output", type=Path, default=Path("docs/images"))
    args = parser.parse_args()
    runs = [RunDirectory.open(path) for path in args.runs]
    before, after = (read_evaluation(runs[0], moment) for moment in ("before", "after"))
    if before is None or after is None:
        parser.error(f"{args.runs[0]} has no evaluation before and after training: the run did not finish")
    args.output.mkdir(parents=True, exist_ok=True)
    restorations(before, after, args.photographs, args.output / "restorations.png")
    rewards(runs, args.output / "rewards.png")


if __name__ == "__main__":
    main()
