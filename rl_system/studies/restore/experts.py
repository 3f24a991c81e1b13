"""Who chooses the best of several results, without a ground truth."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from reward_servers.contract import RewardServerError
from reward_servers.iqa import Iqa, IqaConfig
from vlcot.grammar import Support
from vlcot.groups import Sample
from vlcot.metrics import METRICS

NO_WEIGHTS = ("agreement", "likelihood")
METRIC_NAMES = tuple(name for name, metric in METRICS.items() if not metric.needs_reference)
EXPERTS = (*NO_WEIGHTS, *METRIC_NAMES)

Score = Callable[[np.ndarray, np.ndarray, Sequence[Sample]], float]
"""Of a result, uint8 [H, W, 3], the input, uint8 [h, w, 3], and the result's chains; more is better."""


class ExpertFailed(RuntimeError):
    """The expert has no score for this picture."""


def expert(name: str, weights: Path | None, device: str, threads: int) -> Score:
    """The expert of this name in :data:`EXPERTS`.

    Raises:
        ValueError: an unknown name, or weights that are missing or do not fit.
    """
    if name == "agreement":
        return lambda result, source, chains: agreement(result, source)
    if name == "likelihood":
        return lambda result, source, chains: likelihood(chains)
    if name not in METRIC_NAMES:
        raise ValueError(f"--best {name}: there are {', '.join(EXPERTS)}")
    try:
        iqa = Iqa(IqaConfig((name,), None if weights is None else str(weights), device, threads))
    except ValueError as error:
        raise ValueError(f"--best {name}: {str(error).replace('iqa.weights_dir', '--weights')}") from error
    sign = -1.0 if METRICS[name].lower_is_better else 1.0

    def score(result: np.ndarray, source: np.ndarray, chains: Sequence[Sample]) -> float:
        try:
            (measurement,) = iqa.measure([([result], None)])
        except (RewardServerError, ValueError) as error:
            raise ExpertFailed(f"{name}: {error}") from error
        return sign * measurement.values[name][0]

    return score


def agreement(result: np.ndarray, source: np.ndarray) -> float:
    """PSNR in dB between the input and the result shrunk to its size (Pillow's bicubic, antialiased).

    pyiqa's 1e-8 is added to the mean squared error, so that two equal pictures have 80 dB.
    """
    size = (source.shape[1], source.shape[0])
    shrunk = np.asarray(Image.fromarray(result).resize(size, Image.Resampling.BICUBIC), np.float64)
    return float(-10 * np.log10(np.mean(((shrunk - source) / 255) ** 2) + 1e-8))


def likelihood(chains: Sequence[Sample]) -> float:
    """Mean log-prob (natural) of the ids that the policy chose, over all chains; forced ids were no choice."""
    free = [chain.logprobs[chain.supports != Support.FORCED] for chain in chains]
    return float(np.concatenate(free).mean(dtype=np.float64))
