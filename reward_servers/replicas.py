"""Replicas of the reward servers: a model behind the methods that Serve handles and HTTP routes call."""

from __future__ import annotations

import asyncio
import inspect
import logging
import os
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from importlib import import_module
from typing import Any, Protocol, TypeAlias

import numpy as np
import ray

from reward_servers.answer_cache import AnswerCache, content_key
from reward_servers.batcher import Batcher
from reward_servers.contract import Captions, Detection, Judgement, Measurement, RewardServerError, Tags
from reward_servers.grounded_sam import GroundedSam, GroundedSamConfig, Request, check_image
from reward_servers.iqa import Iqa, IqaConfig
from reward_servers.qwen_vl import VisualExpert, VisualExpertConfig

Image: TypeAlias = np.ndarray | ray.ObjectRef
"""uint8 [H, W, 3] RGB, or a reference to one in Ray's object store."""

log = logging.getLogger(__name__)


async def fetched(image: Image) -> np.ndarray:
    """The image itself; references inside lists reach a replica as references."""
    return await image if isinstance(image, ray.ObjectRef) else image


class _Model(Protocol):
    def reconfigure(self, settings: Mapping[str, Any]) -> None: ...


class Live:
    """Settings of a model that Serve's ``user_config`` changes while it serves.

    Serve ends a replica whose ``reconfigure`` raises. Settings that come with a new replica are refused that way: it
    never served. A replica that serves keeps the settings that it has, and says so in ``ready``.
    """

    def __init__(self, model: _Model) -> None:
        self._model = model
        self._serving = False
        self.changes = 0
        """How often settings changed: a number that answers under other settings do not have."""
        self._now: dict[str, Any] = {}
        self._refused: str | None = None

    def change(self, settings: Mapping[str, Any] | None) -> None:
        """Raises ValueError for bad settings before the first good ones."""
        try:
            self._model.reconfigure(settings or {})
        except ValueError as error:
            if not self._serving:
                raise
            self._refused = str(error)
            log.error("settings refused, the present ones stay: %s", error)
            return
        self._serving, self._now, self._refused = True, dict(settings or {}), None
        self.changes += 1

    def said(self) -> dict[str, Any]:
        """Settings in force, and why newer ones were refused, if they were."""
        return {"settings": self._now} | ({"refused": self._refused} if self._refused else {})


class GroundedSamReplica:
    """One Grounded-SAM process; requests that arrive together make one batch, equal ones are answered once.

    Args:
        batch_size: largest batch.
        batch_wait_s: how long a model that has nothing to do waits for a batch to fill, seconds.
        cache_size: answers kept; those with masks are not.
    """

    def __init__(self, config: GroundedSamConfig, batch_size: int, batch_wait_s: float, cache_size: int = 4096) -> None:
        self._model = GroundedSam(config)
        self._live = Live(self._model)
        self._cache: AnswerCache[Detection] = AnswerCache(cache_size)
        self._batches: Batcher[Request, Detection] = Batcher(self._model.detect_all, batch_size, batch_wait_s)

    async def objects(self, image: Image, names: Sequence[str] | None = None, masks: bool = False) -> Detection:
        """Objects of one image. Raises ValueError for a bad one, before it can spoil the batch of others."""
        pixels = await fetched(image)
        check_image(pixels)
        if names is not None:
            self._model.check_names(names)

        async def ask() -> Detection:
            return await self._batches.answer((pixels, masks, names))

        if masks:
            return await ask()
        return await self._cache.answer(content_key(pixels, names, self._live.changes), ask)

    async def ready(self) -> dict[str, Any]:
        """Checkpoints, process id, versions as imported here, live settings."""
        config = self._model.config
        about = {"detector": config.detector, "segmenter": config.segmenter, "cached": self._cache.hits}
        return about | _process("torch", "transformers") | self._live.said()

    def reconfigure(self, user_config: Mapping[str, Any] | None) -> None:
        """As :class:`Live`."""
        self._live.change(user_config)

    def check_health(self) -> None:
        """Serve replaces the replica when this raises."""
        check_device(self._model.config.device)


class VisualExpertReplica:
    """One visual expert; vLLM inside batches the requests."""

    def __init__(self, config: VisualExpertConfig) -> None:
        self._expert = VisualExpert(config)
        self._live = Live(self._expert)

    async def judge(self, lr: Image, images: Sequence[Image], seed: int) -> list[Judgement]:
        """As :meth:`VisualExpert.judge`."""
        reference, *shown = await asyncio.gather(fetched(lr), *(fetched(image) for image in images))
        async with self._or_end():
            return await self._expert.judge(reference, shown, seed)

    async def caption(self, image: Image) -> Captions:
        """As :meth:`VisualExpert.caption`."""
        pixels = await fetched(image)
        async with self._or_end():
            return await self._expert.caption(pixels)

    async def tag(self, image: Image) -> Tags:
        """As :meth:`VisualExpert.tag`."""
        pixels = await fetched(image)
        async with self._or_end():
            return await self._expert.tag(pixels)

    async def ready(self) -> dict[str, Any]:
        """As :meth:`VisualExpert.ready`, with the live settings."""
        return await self._expert.ready() | self._live.said()

    def reconfigure(self, user_config: Mapping[str, Any] | None) -> None:
        """As :class:`Live`."""
        self._live.change(user_config)

    async def check_health(self) -> None:
        """Serve replaces the replica when this raises."""
        await self._expert.check_health()

    @asynccontextmanager
    async def _or_end(self) -> AsyncIterator[None]:
        """End this process if its engine is dead: failing at once, it would draw most requests until a health check."""
        try:
            yield
        except RewardServerError:
            try:
                await self._expert.check_health()
            except RewardServerError as error:
                log.critical("%s; this replica ends, Serve starts another", error)
                logging.shutdown()
                os._exit(1)
            raise

    def __del__(self) -> None:
        if hasattr(self, "_expert"):
            self._expert.shutdown()


class IqaReplica:
    """One process with the metrics; requests that arrive together make one batch."""

    def __init__(self, config: IqaConfig, batch_size: int, batch_wait_s: float) -> None:
        self._model = Iqa(config)
        self._live = Live(self._model)
        self._batches: Batcher[Any, Measurement | RewardServerError] = Batcher(
            self._model.measure_each, batch_size, batch_wait_s
        )

    async def measure(self, images: Sequence[Image], reference: Image | None = None) -> Measurement:
        """As :meth:`Iqa.measure`, of one request."""
        shown = await asyncio.gather(*(fetched(image) for image in images))
        truth = None if reference is None else await fetched(reference)
        self._model.check(shown, truth)
        answer = await self._batches.answer((shown, truth))
        if isinstance(answer, RewardServerError):
            raise answer
        return answer

    async def ready(self) -> dict[str, Any]:
        """Process id, versions as imported here, live settings."""
        return _process("torch", "pyiqa") | self._live.said()

    def reconfigure(self, user_config: Mapping[str, Any] | None) -> None:
        """As :class:`Live`."""
        self._live.change(user_config)

    def check_health(self) -> None:
        """Serve replaces the replica when this raises."""
        check_device(self._model.config.device)


class CustomReplica:
    """A reward of the user's own: a class in one process.

    Args:
        target: ``module:Class``. ``Class(**options)`` has ``score(lr, images)``, which answers a number in [0, 1] for
            each restoration uint8 [H, W, 3] of the photograph ``lr`` uint8 [h, w, 3]. It is called by one thread at a
            time; a coroutine, as for a judge behind a network, runs beside the others in the event loop.
        options: keyword arguments of the class.
        folder: where the module lies, for a process that does not find it by itself.
    """

    def __init__(self, target: str, options: Mapping[str, Any], folder: str) -> None:
        if folder not in sys.path:
            sys.path.append(folder)
        self._target = target
        self._scorer = custom_class(target)(**options)
        # A lock would be free again as soon as a caller gives up, while the thread that serves it goes on.
        self._thread = ThreadPoolExecutor(max_workers=1)

    async def score(self, lr: Image, images: Sequence[Image]) -> list[float]:
        """Scores of one group's images, in their order."""
        photograph, *shown = await asyncio.gather(fetched(lr), *(fetched(image) for image in images))
        if inspect.iscoroutinefunction(self._scorer.score):
            return list(await self._scorer.score(photograph, shown))
        scores = asyncio.get_running_loop().run_in_executor(self._thread, self._scorer.score, photograph, shown)
        return list(await scores)

    async def ready(self) -> dict[str, Any]:
        """What is served, and the process id."""
        return {"target": self._target} | _process()

    def reconfigure(self, user_config: Mapping[str, Any] | None) -> None:
        """Raises ValueError for any setting: a class of the user's own has no live ones."""
        if user_config:
            raise ValueError(f"{self._target} has no live settings, got {', '.join(user_config)}")


def custom_class(target: str) -> Any:
    """The class ``module:Class``; the working directory is searched too.

    Raises:
        ValueError: there is none, or it has no method ``score``.
    """
    if (here := os.getcwd()) not in sys.path:
        sys.path.append(here)
    module, _, name = target.partition(":")
    try:
        found = getattr(import_module(module), name)
    except Exception as error:  # a user's module may raise anything
        raise ValueError(
            f"{target!r} is no module:Class that can be imported: {type(error).__name__}: {error}"
        ) from None
    if not callable(getattr(found, "score", None)):
        raise ValueError(f"{target!r} has no method score(lr, images)")
    return found


def check_device(device: str) -> None:
    """Raises torch's error if the process can use its GPU no more: after some CUDA errors no call ever works again."""
    if device.startswith("cuda"):
        import torch

        torch.cuda.synchronize(device)


def _process(*modules: str) -> dict[str, Any]:
    return {"pid": os.getpid()} | {name: import_module(name).__version__ for name in modules}
