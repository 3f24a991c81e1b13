"""Image-quality metrics of restorations: pyiqa's, called exactly as ``rl-system evaluate`` calls them.

PSNR and SSIM need no weights. The others take published files that are found by name and never downloaded
(``vlcot.metric_weights``).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch

from reward_servers.checks import check_count
from reward_servers.contract import Measurement, RewardServerError
from reward_servers.grounded_sam import check_image
from vlcot import metric_weights
from vlcot.metrics import METRICS, load_metric, missing_weights, score_images

IMAGE_METRICS = tuple(name for name, metric in METRICS.items() if not metric.compares_folders)
"""What this server can measure; FID needs whole folders."""

Request: TypeAlias = tuple[Sequence[np.ndarray], np.ndarray | None]
"""Images uint8 [H, W, 3] RGB of one restoration task, and their ground truth of the same shape, if it is known."""

_Job: TypeAlias = tuple[np.ndarray, np.ndarray | None]


@dataclass(frozen=True)
class IqaConfig:
    """What is measured.

    Attributes:
        metrics: names in :data:`IMAGE_METRICS`.
        weights_dir: folder under which weight files are searched, before torch's hub folder.
        device: torch device of the models.
        threads: CPU threads of this process.
        batch_size: most images of one model call; None: 16 on a GPU and 1 on a CPU, where a batch is no faster and
            would change the last digit of a network's value by what else is in it.
    """

    metrics: tuple[str, ...]
    weights_dir: str | None = None
    device: str = "cpu"
    threads: int = 1
    batch_size: int | None = None

    def __post_init__(self) -> None:
        unknown = [name for name in self.metrics if name not in IMAGE_METRICS]
        if unknown:
            raise ValueError(f"iqa.metrics: no {', '.join(unknown)}; there are {', '.join(IMAGE_METRICS)}")
        if not self.metrics or len(set(self.metrics)) < len(self.metrics):
            raise ValueError(f"iqa.metrics must name at least one metric and none twice, got {list(self.metrics)}")
        check_count("iqa.threads", self.threads)
        if self.batch_size is not None:
            check_count("iqa.batch_size", self.batch_size)


def find_weights(config: IqaConfig) -> dict[str, Path]:
    """Weight file name -> path, of all metrics.

    Raises:
        ValueError: naming each metric that lacks a file, the files, and where they were searched.
    """
    folder = None if config.weights_dir is None else Path(config.weights_dir)
    if folder is not None and not folder.is_dir():
        raise ValueError(f"iqa.weights_dir={folder}: no such folder")
    files = metric_weights.find((file for name in config.metrics for file in METRICS[name].weights), folder)
    if missing := missing_weights(config.metrics, files):
        lacking = "; ".join(f"{name} needs {', '.join(absent)}" for name, absent in missing.items())
        places = " and ".join(str(place) for place in (folder, torch.hub.get_dir()) if place)
        raise ValueError(f"iqa.weights_dir: {lacking}: not found under {places}, and nothing is downloaded")
    return files


class Iqa:
    """Metrics of photographs. Usable in any process, without Ray.

    Raises:
        ValueError: a weight file is missing or does not fit its metric; both are named.
    """

    def __init__(self, config: IqaConfig) -> None:
        torch.set_num_threads(config.threads)
        self.config = config
        files = find_weights(config)
        self._models = {name: load_metric(METRICS[name], files).to(config.device) for name in config.metrics}

    def check(self, images: Sequence[np.ndarray], reference: np.ndarray | None) -> None:
        """Raises ValueError unless these can be one request; a batch should hold no others."""
        if not images:
            raise ValueError("a request must have at least one image")
        for image in (*images, *(() if reference is None else (reference,))):
            check_image(image)
        shapes = {image.shape for image in images}
        if len(shapes) > 1:
            raise ValueError(f"all images of a request must have one size, got {sorted(shapes)}")
        against = [name for name in self.config.metrics if METRICS[name].needs_reference]
        if against and reference is None:
            raise ValueError(f"{', '.join(against)} compare with a reference image, and none was sent")
        if against and reference is not None and {reference.shape} != shapes:
            raise ValueError(
                f"the reference image must have the size of the others, got {reference.shape} and {shapes.pop()}"
            )

    def measure(self, requests: Sequence[Request]) -> list[Measurement]:
        """Every metric of every image; images of one size are measured together, also across requests.

        Raises:
            ValueError: as :meth:`check`.
            RewardServerError: a value could not be computed or is not finite; names the metric and the image.
        """
        answers = []
        for answer in self.measure_each(requests):
            if isinstance(answer, RewardServerError):
                raise answer
            answers.append(answer)
        return answers

    def measure_each(self, requests: Sequence[Request]) -> list[Measurement | RewardServerError]:
        """As :meth:`measure`, but a request that cannot be measured leaves the answers to the others as they are."""
        for images, reference in requests:
            self.check(images, reference)
        jobs: list[_Job] = [(image, reference) for images, reference in requests for image in images]
        found = {name: iter(self._scores(name, jobs)) for name in self.config.metrics}
        return [_answer(found, len(images)) for images, _ in requests]

    def reconfigure(self, settings: Mapping[str, Any]) -> None:
        """Live settings, of which this server has none.

        Raises:
            ValueError: ``settings`` has a key.
        """
        if settings:
            raise ValueError(f"iqa.{next(iter(settings))} is no live setting; iqa has none")

    def _scores(self, name: str, jobs: Sequence[_Job]) -> list[float | str]:
        """The metric of each image, or why there is none."""
        size = self.config.batch_size or (1 if self.config.device == "cpu" else 16)
        scores: list[float | str] = [""] * len(jobs)
        for shape in dict.fromkeys(image.shape for image, _ in jobs):
            places = [place for place, (image, _) in enumerate(jobs) if image.shape == shape]
            for start in range(0, len(places), size):
                chunk = places[start : start + size]
                for place, score in zip(chunk, self._call(name, [jobs[place] for place in chunk]), strict=True):
                    scores[place] = score
        return scores

    def _call(self, name: str, jobs: Sequence[_Job]) -> list[float | str]:
        images, references = zip(*jobs, strict=True)
        try:
            return [*score_images(METRICS[name], self._models[name], images, references)]
        # A metric fails in as many ways as there are networks: images too small, flat ones, no memory.
        except Exception as error:
            if len(jobs) > 1:  # whose fault it is shows when each is alone
                return [score for job in jobs for score in self._call(name, [job])]
            return [f"failed: {type(error).__name__}: {error}"]


def _answer(found: Mapping[str, Iterator[float | str]], count: int) -> Measurement | RewardServerError:
    values = {name: [next(scores) for _ in range(count)] for name, scores in found.items()}
    for name, scores in values.items():
        for index, score in enumerate(scores):
            if isinstance(score, str):
                return RewardServerError(f"{name} of image {index} {score}")
            if not math.isfinite(score):
                return RewardServerError(f"{name} of image {index} is {score}")
    return Measurement({name: tuple(float(score) for score in scores) for name, scores in values.items()})
