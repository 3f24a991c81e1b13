"""Every metric of every image, in parallel processes."""

from __future__ import annotations

import math
import multiprocessing
import signal
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rl_system.studies.evaluate.images import EvaluationRefused, Pair, check_pair, read_rgb
from vlcot.metrics import METRICS, load_metric, score_folders, score_image

Progress = Callable[[int, int], None]
_models: dict[str, torch.nn.Module] = {}
_weights: dict[str, Path] = {}


class EvaluationFailed(RuntimeError):
    """A metric or a process failed on input that looked sound."""


@dataclass(frozen=True)
class Job:
    """One method on one data set, with the metrics that can be computed there."""

    data_set: str
    method: str
    pairs: tuple[Pair, ...]
    metrics: tuple[str, ...]


@dataclass(frozen=True)
class Scores:
    """``images`` is image name -> metric -> value; ``means`` holds their means, and FID of the folder."""

    data_set: str
    method: str
    images: Mapping[str, Mapping[str, float]]
    means: Mapping[str, float]


def evaluate(jobs: Sequence[Job], weights: Mapping[str, Path], processes: int, progress: Progress) -> list[Scores]:
    """Check every image of every job, then score them; ``progress(done, total)`` counts images and folders.

    Args:
        weights: weight file name -> path, for all metrics of all jobs.

    Raises:
        EvaluationRefused: an image cannot be read, sizes differ, weights do not fit, a value is not finite.
        EvaluationFailed: a metric raised, or a process died.
    """
    checks = [(check_pair, pair) for job in jobs for pair in job.pairs]
    scorings: list[tuple[Any, ...]] = []
    for job in jobs:
        of_images = tuple(name for name in job.metrics if not METRICS[name].compares_folders)
        scorings += [(_score_pair, pair, of_images) for pair in job.pairs]
        scorings += [(_score_folder, job.pairs, name) for name in job.metrics if METRICS[name].compares_folders]
    with _pool(processes, weights) as pool:
        _run(pool, checks, lambda done, total: None)
        values = iter(_run(pool, scorings, progress))
    return [_scores(job, values) for job in jobs]


def _scores(job: Job, values: Iterator[Any]) -> Scores:
    images = {pair.name: next(values) for pair in job.pairs}
    means = {
        name: next(values)
        if METRICS[name].compares_folders
        else math.fsum(scores[name] for scores in images.values()) / len(images)
        for name in job.metrics
    }
    return Scores(job.data_set, job.method, images, means)


def _score_pair(pair: Pair, metrics: Sequence[str]) -> dict[str, float]:
    image = read_rgb(pair.result)
    reference = None if pair.reference is None else read_rgb(pair.reference)
    return {
        name: _finite(name, pair.result, score_image, METRICS[name], _model(name), image, reference) for name in metrics
    }


def _score_folder(pairs: Sequence[Pair], name: str) -> float:
    """FID over exactly the paired images, whatever else their folders hold."""
    with tempfile.TemporaryDirectory(prefix="evaluate-") as staged:
        results, references = Path(staged) / "results", Path(staged) / "references"
        for pair in pairs:
            for folder, path in ((results, pair.result), (references, pair.reference)):
                assert path is not None
                folder.mkdir(exist_ok=True)
                (folder / path.name).symlink_to(path.resolve())
        return _finite(name, pairs[0].result.parent, score_folders, _model(name), results, references)


def _finite(name: str, where: Path, compute: Callable[..., float], *args: Any) -> float:
    try:
        value = compute(*args)
    except (RuntimeError, AssertionError, ValueError) as error:
        raise EvaluationFailed(f"{name} failed on {where}: {str(error).strip() or type(error).__name__}") from error
    if not math.isfinite(value):
        raise EvaluationRefused(f"{name} of {where} is {value}: too few images, or too small ones")
    return value


def _model(name: str) -> torch.nn.Module:
    if name not in _models:
        try:
            _models[name] = load_metric(METRICS[name], _weights)
        except ValueError as error:
            raise EvaluationRefused(str(error)) from error
    return _models[name]


@contextmanager
def _pool(processes: int, weights: Mapping[str, Path]) -> Iterator[Executor | None]:
    """None for one process: the work is done in this one."""
    if processes == 1:
        threads = torch.get_num_threads()
        _start(weights)
        try:
            yield None
        finally:
            torch.set_num_threads(threads)
            _models.clear()
        return
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), _start_process, (dict(weights),))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _start_process(weights: Mapping[str, Path]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt is for the parent, which ends the pool
    _start(weights)


def _start(weights: Mapping[str, Path]) -> None:
    """One thread a process; each loads a model when it first needs it."""
    torch.set_num_threads(1)
    _models.clear()
    _weights.clear()
    _weights.update(weights)


def _run(pool: Executor | None, calls: Sequence[tuple[Any, ...]], progress: Progress) -> list[Any]:
    """The results of ``function(*args)`` for each ``(function, *args)``, in order; the first failure ends it."""
    progress(0, len(calls))
    if pool is None:
        values = []
        for function, *args in calls:
            values.append(function(*args))
            progress(len(values), len(calls))
        return values
    try:
        futures = [pool.submit(*call) for call in calls]
        for done, future in enumerate(as_completed(futures), start=1):
            future.result()
            progress(done, len(calls))
    except BrokenProcessPool as error:
        raise EvaluationFailed("a process died, for want of memory perhaps; try fewer --processes") from error
    return [future.result() for future in futures]
