"""``rl-system evaluate``: the paper's ten metrics, per image and as its table."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

from rl_system.commands import exit_codes
from rl_system.commands.arguments import named_folder, positive

PROGRAM = "rl-system evaluate"


def run(args: list[str]) -> int:
    """Evaluate; returns the exit code: 0 done, 1 error, 2 refused, 130 interrupted. Nothing is half written."""
    options = _parser().parse_args(args)
    from rl_system.studies.evaluate.images import EvaluationRefused  # torch and pyiqa are needed from here on
    from rl_system.studies.evaluate.scoring import EvaluationFailed

    try:
        _evaluate(options)
    except EvaluationRefused as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return exit_codes.BAD_INPUT
    except (EvaluationFailed, OSError) as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return exit_codes.ERROR
    except KeyboardInterrupt:
        print(f"{PROGRAM}: interrupted; nothing was written", file=sys.stderr)
        return exit_codes.INTERRUPTED
    return exit_codes.OK


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        PROGRAM,
        description="The paper's ten metrics of restored photographs, per image and as the paper's table.",
        epilog=(
            "A result and its reference have one name, up to the suffix. FOLDER of a method has a folder per data set, "
            "DATA; with one data set it may hold the images itself. Published figures stand beside a data set called "
            "RealSR or DRealSR. Weights: see docs/evaluate.md."
        ),
    )
    add = parser.add_argument
    add(
        "--data",
        metavar="DATA[=REFERENCES]",
        action="append",
        required=True,
        type=named_folder,
        help="a data set and the folder of its ground truths; without one only NIQE, MANIQA, MUSIQ, CLIPIQA, TOPIQ",
    )
    add(
        "--method",
        metavar="NAME=FOLDER",
        action="append",
        required=True,
        type=named_folder,
        help="a method and its results",
    )
    add("--output", metavar="DIR", required=True, type=Path, help="folder to write; must not exist")
    add("--weights", metavar="DIR", type=Path, help="where the metrics' weight files are; nothing is downloaded")
    add("--metrics", metavar="A,B", type=lambda text: text.split(","), help="only these, as PSNR,SSIM; default all ten")
    add("--processes", metavar="N", type=positive, default=len(os.sched_getaffinity(0)), help="default: all cores")
    return parser


def _evaluate(options: argparse.Namespace) -> None:
    from rl_system.studies.evaluate import images, output, scoring, tables
    from vlcot.metric_weights import find
    from vlcot.metrics import METRICS, missing_weights

    _check(options, tuple(METRICS))
    chosen = [name for name in METRICS if options.metrics is None or name in options.metrics]
    data_sets = [images.DataSet(*named) for named in options.data]
    rows = {d.name: [m for m in tables.rows_of(d.references is not None) if m in chosen] for d in data_sets}
    wanted = [name for name in chosen if any(name in metrics for metrics in rows.values())]
    weights = find((file for name in wanted for file in METRICS[name].weights), options.weights)
    missing = missing_weights(wanted, weights)
    used = {file: weights[file] for name in wanted if name not in missing for file in METRICS[name].weights}
    if len(missing) == len(wanted):
        why = [f"{name}: {', '.join(files)} missing" for name, files in missing.items()]
        why = [*why, tables.HOW_TO_GIVE] if why else [f"{', '.join(chosen)}: no data set has references"]
        raise images.EvaluationRefused(f"no metric can be computed ({'; '.join(why)})")

    jobs = []
    for data_set in data_sets:
        folders = [images.results_folder(folder, data_set, len(data_sets)) for _, folder in options.method]
        for (method, _), folder in zip(options.method, folders, strict=True):
            pairs = images.pair_images(folder, data_set, like=folders[0])
            names = tuple(name for name in rows[data_set.name] if name not in missing)
            jobs.append(scoring.Job(data_set.name, method, tuple(pairs), names))
    for name, files in missing.items():
        print(f"{name} is not computed: {', '.join(files)} missing. {tables.HOW_TO_GIVE}", file=sys.stderr)
    scores = scoring.evaluate(jobs, used, options.processes, _progress())
    table = tables.build_table(scores, rows, missing)
    output.write_results(options.output, scores, table, missing, used)
    print(tables.to_markdown(table))
    print(f"{options.output}: table.md, table.tex, table.html, per_image.csv, scores.json")


def _check(options: argparse.Namespace, metrics: tuple[str, ...]) -> None:
    from rl_system.studies.evaluate.images import EvaluationRefused, check_named

    check_named("--data", options.data)
    check_named("--method", options.method, folders=True)
    unknown = [name for name in options.metrics or () if name not in metrics]
    if unknown:
        raise EvaluationRefused(f"--metrics: no {', '.join(unknown)}; there are {', '.join(metrics)}")
    if options.weights is not None and not options.weights.is_dir():
        raise EvaluationRefused(f"--weights: there is no folder {options.weights}")
    if options.output.exists():
        raise EvaluationRefused(f"--output {options.output} exists already; give a new folder")


def _progress() -> Callable[[int, int], None]:
    """Counts on one line of a terminal, or a line every tenth of the way."""
    start, terminal = time.monotonic(), sys.stderr.isatty()

    def show(done: int, total: int) -> None:
        elapsed = time.monotonic() - start
        left = f", {elapsed / done * (total - done):.0f} s left" if 0 < done < total else ""
        line = f"{done}/{total} scored in {elapsed:.0f} s{left}"
        if terminal:
            print(f"\r{line:<60}", end="\n" if done == total else "", file=sys.stderr, flush=True)
        elif done * 10 // total > (done - 1) * 10 // total:
            print(line, file=sys.stderr, flush=True)

    return show
