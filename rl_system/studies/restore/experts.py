"""Who chooses the best of several results, without a ground truth."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from reward_servers.client import QWEN_VL, RewardClient
from reward_servers.contract import Judgement, RewardServerError
from reward_servers.http_guard import token_of_environment
from reward_servers.http_transport import HttpTransport
from reward_servers.iqa import Iqa, IqaConfig
from vlcot.grammar import Support
from vlcot.groups import Failed, Sample
from vlcot.metrics import METRICS
from vlcot.rewards import ExpertWeights, generation_reward

NO_WEIGHTS = ("agreement", "likelihood")
METRIC_NAMES = tuple(name for name, metric in METRICS.items() if not metric.needs_reference)
EXPERTS = (*NO_WEIGHTS, QWEN_VL, *METRIC_NAMES)
TIMEOUT_S, READY_S = 300.0, 20.0
"""For the visual expert to judge the results of one picture, and to answer whether it is there."""

Score = Callable[[Sequence[np.ndarray], np.ndarray, Sequence[Sequence[Sample]]], list[float]]
"""Of results uint8 [H, W, 3] of one input uint8 [h, w, 3], and the chains of each; more is better."""


class ExpertFailed(RuntimeError):
    """The expert has no score for this picture."""


def expert(name: str, samples: int, weights: Path | None, url: str | None, device: str, threads: int) -> Score:
    """The expert of this name in :data:`EXPERTS`.

    Args:
        samples: of each picture, among which it is to choose.
        weights: folder of the metrics' weights.
        url: of the reward servers, for ``qwen_vl``.

    Raises:
        ValueError: an unknown name, weights that are missing or do not fit, or a server that is not there or does not
            compare so many.
    """
    if name == "agreement":
        return lambda results, source, chains: [agreement(result, source) for result in results]
    if name == "likelihood":
        return lambda results, source, chains: [likelihood(of) for of in chains]
    if name == QWEN_VL:
        return _visual_expert(url, samples)
    if name not in METRIC_NAMES:
        raise ValueError(f"--best {name}: there are {', '.join(EXPERTS)}")
    try:
        iqa = Iqa(IqaConfig((name,), None if weights is None else str(weights), device, threads))
    except ValueError as error:
        raise ValueError(f"--best {name}: {str(error).replace('iqa.weights_dir', '--weights')}") from error
    sign = -1.0 if METRICS[name].lower_is_better else 1.0

    def score(results: Sequence[np.ndarray], source: np.ndarray, chains: Sequence[Sequence[Sample]]) -> list[float]:
        try:
            (measurement,) = iqa.measure([(list(results), None)])
        except (RewardServerError, ValueError) as error:
            raise ExpertFailed(f"{name}: {error}") from error
        return [sign * value for value in measurement.values[name]]

    return score


def _visual_expert(url: str | None, samples: int) -> Score:
    """Qwen2.5-VL sees all results of a picture beside its input, and scores them as in training."""
    if not url:
        raise ValueError(
            f"--best {QWEN_VL} asks a reward server: say --reward-url, as rl-system serve-rewards prints it"
        )
    server, token = url, token_of_environment()
    try:
        most = asyncio.run(asyncio.wait_for(_most_images(HttpTransport(server, token)), READY_S))
    except (RewardServerError, ValueError, TimeoutError) as error:
        raise ValueError(f"--best {QWEN_VL}: {error or f'{server} gave no answer in {READY_S:g} s'}") from error
    if samples > most:
        raise ValueError(
            f"--best {QWEN_VL}: {server} compares at most {most} images (max_images), --samples is {samples}"
        )

    def score(results: Sequence[np.ndarray], source: np.ndarray, chains: Sequence[Sequence[Sample]]) -> list[float]:
        answer = asyncio.run(_judge(HttpTransport(server, token), source, results))
        if isinstance(answer, Failed):
            raise ExpertFailed(answer.reason)
        return [generation_reward(vars(judgement), ExpertWeights()).value for judgement in answer]

    return score


async def _most_images(transport: HttpTransport) -> int:
    try:
        return int((await transport.call(QWEN_VL, "ready", {}))["max_images"])
    finally:
        await transport.close()


async def _judge(
    transport: HttpTransport, source: np.ndarray, results: Sequence[np.ndarray]
) -> list[Judgement] | Failed:
    client = RewardClient(transport, TIMEOUT_S)
    try:
        return await client.judge(source, results, seed=0)
    finally:
        await client.close()


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
