"""The visual expert: Qwen2.5-VL in vLLM, with three jobs on one engine.

As expert it scores the images of a group against their LR image: one request shows the LR image and the whole group.
As captioner it writes the coarse, middle and fine text of an image in a dialogue. As tagger it names its objects.
Decoding is greedy, and vLLM's structured output (xgrammar) forces the JSON schemas of scores and tags. A retry of an
answer that cannot be used shows the group in another order, or draws at :data:`RETRY_TEMPERATURE` from a fixed seed.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from reward_servers import caption_chat, expert_chat, tag_chat
from reward_servers.caption_chat import CaptionPrompt
from reward_servers.checks import check_count
from reward_servers.contract import Captions, Judgement, RewardServerError, Tags
from reward_servers.expert_chat import ExpertPrompt, average, in_sent_order, shown_orders
from reward_servers.live_settings import with_settings
from reward_servers.tag_chat import TagPrompt
from reward_servers.vlm_engine import Decoding, Reply, VlmEngine

DTYPES = ("float32", "bfloat16", "float16", "auto")

LIVE = ("prompt", "repeats", "retries", "rationale", "caption_prompt", "tag_prompt")
"""Settings that :meth:`VisualExpert.reconfigure` changes."""

RETRY_TEMPERATURE = 0.7
"""Of the captioner's and the tagger's further attempts: decoded greedily they would fail as the first one did."""

Answer = TypeVar("Answer")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class VisualExpertConfig:
    """How the expert is served.

    Attributes:
        model: directory (or hub name) of a Qwen2.5-VL checkpoint with its processor.
        max_images: largest group.
        max_model_len: longest chat, tokens: images, rubric and answer.
        kv_cache_gib: GiB of key/value cache; None takes ``gpu_memory_utilization`` of the device instead.
        dtype: of weights and activations; auto is the checkpoint's.
        prompt: what is asked; None takes :meth:`ExpertPrompt.of_checkpoint`.
        seed: of the engine. Decoding is greedy: answers do not depend on it.
        repeats: requests per group, each in another image order; their scores are averaged. A multiple of the group's
            size cancels a preference for a position.
        retries: further requests for an answer that cannot be used.
        threads: CPU threads of the engine.
        max_num_seqs: requests that the engine runs at the same time.
        tensor_parallel_size: devices.
        gpu_memory_utilization: share of the device that vLLM may take.
        enforce_eager: no compilation, no CUDA graphs: starts faster.
        rationale: ask for a short reason per image.
        caption_prompt: what the captioner is asked.
        tag_prompt: what the tagger is asked.
    """

    model: str
    max_images: int = 8
    max_model_len: int = 8192
    kv_cache_gib: float | None = None
    dtype: str = "auto"
    prompt: ExpertPrompt | None = None
    seed: int = 0
    repeats: int = 1
    retries: int = 2
    threads: int = 1
    max_num_seqs: int = 8
    tensor_parallel_size: int = 1
    gpu_memory_utilization: float = 0.9
    enforce_eager: bool = True
    rationale: bool = False
    caption_prompt: CaptionPrompt = field(default_factory=CaptionPrompt)
    tag_prompt: TagPrompt = field(default_factory=TagPrompt)

    def __post_init__(self) -> None:
        for name in ("seed", "retries"):
            check_count(f"qwen_vl.{name}", getattr(self, name), least=0)
        for name in ("max_images", "max_model_len", "repeats", "threads", "max_num_seqs", "tensor_parallel_size"):
            check_count(f"qwen_vl.{name}", getattr(self, name))
        if not isinstance(self.rationale, bool):
            raise ValueError(f"qwen_vl.rationale must be true or false, got {self.rationale!r}")
        if self.dtype not in DTYPES:
            raise ValueError(f"qwen_vl.dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if self.kv_cache_gib is not None and not 0 < self.kv_cache_gib < float("inf"):
            raise ValueError(f"qwen_vl.kv_cache_gib must be positive or null, got {self.kv_cache_gib}")
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ValueError(f"qwen_vl.gpu_memory_utilization must lie in (0, 1], got {self.gpu_memory_utilization}")


class VisualExpert:
    """Judges groups of restorations, captions and tags images. Starting takes as long as vLLM needs to load the model.

    Args:
        config: settings.
        engine: answers the chats; None starts one.

    Raises:
        ValueError: the model's directory has no ``config.json``, or its ``expert_prompt.json`` is not one.
    """

    def __init__(self, config: VisualExpertConfig, engine: VlmEngine | None = None) -> None:
        if Path(config.model).is_dir() and not (Path(config.model) / "config.json").is_file():
            raise ValueError(f"qwen_vl.model: no checkpoint at {config.model} (config.json is missing)")
        self._started = replace(config, prompt=config.prompt or ExpertPrompt.of_checkpoint(config.model))
        self._config = self._started
        self._engine = engine or _start_engine(config)

    @property
    def config(self) -> VisualExpertConfig:
        """Settings as they are now."""
        return self._config

    def reconfigure(self, settings: Mapping[str, Any]) -> None:
        """Change :data:`LIVE` settings, without loading the model.

        A setting that is not named gets the value the server was started with, so that a replica that starts later
        with the same settings serves alike. Requests under way keep the settings they began with.

        Args:
            settings: fields of :class:`VisualExpertConfig`; prompts are mappings of the fields that change.

        Raises:
            ValueError: a setting that is not live or has a bad value; then nothing changes.
        """
        self._config = with_settings(self._started, settings, LIVE, "qwen_vl")

    async def judge(self, lr: np.ndarray, images: Sequence[np.ndarray], seed: int) -> list[Judgement]:
        """Scores of each image, in the order given.

        Args:
            lr: uint8 [h, w, 3], RGB; shown enlarged to the size of the images (bicubic).
            images: restorations, uint8 [H, W, 3], RGB, all of one size, 1 to ``max_images``.
            seed: of the orders in which they are shown.

        Raises:
            ValueError: an image is not uint8 RGB, sizes differ, or the group is empty or too large.
            RewardServerError: no usable answer after the retries, or the engine failed.
        """
        config = self._config
        _check_group(lr, images, config.max_images)
        height, width = images[0].shape[:2]
        reference = Image.fromarray(lr).resize((width, height), Image.Resampling.BICUBIC)
        pictures = [Image.fromarray(np.ascontiguousarray(image)) for image in images]
        rounds = [
            self._judge_once(config, reference, pictures, order, (seed, number))
            for number, order in enumerate(shown_orders(len(images), config.repeats, seed))
        ]
        return average(await asyncio.gather(*rounds))

    async def caption(self, image: np.ndarray) -> Captions:
        """Coarse, middle and fine text of an image, each asked for with its own picture and all earlier answers.

        Args:
            image: uint8 [n, n, 3], RGB, n a multiple of 4; shown at a quarter, half and all of its size.

        Raises:
            ValueError: the image is not so.
            RewardServerError: an answer was empty after the retries, or the engine failed.
        """
        config, pictures = self._config, caption_chat.shown_sizes(image)
        said: list[str] = []
        for name in caption_chat.ROUNDS:
            text = self._engine.render(caption_chat.chat(config.caption_prompt, said))
            longest = getattr(config.caption_prompt, f"{name}_tokens")
            answer = await self._usable(
                config.retries,
                self._asks(text, pictures[: len(said) + 1], longest),
                lambda reply, _: caption_chat.caption_text(reply.text, reply.complete),
            )
            said.append(answer)
        return Captions(*said)

    async def tag(self, image: np.ndarray) -> Tags:
        """Names of the objects in an image uint8 [H, W, 3], RGB, that :class:`GroundedSam` can look for.

        Raises:
            ValueError: the image is not so.
            RewardServerError: no usable answer after the retries, or the engine failed.
        """
        _check_image("image", image)
        prompt, retries = self._config.tag_prompt, self._config.retries
        ask = self._asks(
            self._engine.render(tag_chat.chat(prompt)),
            [Image.fromarray(np.ascontiguousarray(image))],
            tag_chat.longest_answer(prompt.max_names) + 8,
            tag_chat.answer_schema(prompt.max_names),
        )
        return await self._usable(retries, ask, lambda reply, _: tag_chat.parse_answer(reply.text, prompt.max_names))

    async def ready(self) -> dict[str, Any]:
        """Model, process id, versions of the engine as imported here, and ``max_images`` of a group."""
        return await self._engine.ready() | {"max_images": self._config.max_images}

    async def check_health(self) -> None:
        """Raises RewardServerError if the engine cannot answer any more."""
        await self._engine.check_health()

    def shutdown(self) -> None:
        """End the engine and its processes."""
        self._engine.shutdown()

    async def _judge_once(
        self,
        config: VisualExpertConfig,
        reference: Image.Image,
        pictures: Sequence[Image.Image],
        first: list[int],
        key: tuple[int, int],
    ) -> list[Judgement]:
        """One usable answer about the group, in the order sent; a retry shows another order than ``first``."""
        assert config.prompt is not None
        count = len(pictures)
        text = self._engine.render(expert_chat.chat(config.prompt, count, config.rationale))
        decoding = Decoding(
            # Room for the longest answer even where a model spells it letter by letter.
            max_tokens=expert_chat.longest_answer(count, config.rationale) + 8,
            schema=expert_chat.answer_schema(count, config.rationale),
        )

        def order(attempt: int) -> list[int]:
            return shown_orders(count, 1, (*key, attempt))[0] if attempt else first

        async def ask(attempt: int) -> Reply:
            return await self._engine.answer(text, [reference, *(pictures[i] for i in order(attempt))], decoding)

        def read(reply: Reply, attempt: int) -> list[Judgement]:
            return in_sent_order(expert_chat.parse_answer(reply.text, count, config.rationale), order(attempt))

        return await self._usable(config.retries, ask, read)

    def _asks(
        self, text: str, pictures: list[Image.Image], max_tokens: int, schema: Mapping[str, Any] | None = None
    ) -> Callable[[int], Awaitable[Reply]]:
        """Asks the same chat in every attempt, greedily in the first one."""

        def ask(attempt: int) -> Awaitable[Reply]:
            decoding = Decoding(max_tokens, schema)
            if attempt:
                decoding = replace(decoding, temperature=RETRY_TEMPERATURE, seed=attempt)
            return self._engine.answer(text, pictures, decoding)

        return ask

    @staticmethod
    async def _usable(
        retries: int, ask: Callable[[int], Awaitable[Reply]], read: Callable[[Reply, int], Answer]
    ) -> Answer:
        """What ``read`` makes of the first reply it can use. Failures of the engine itself are not tried again."""
        problem: RewardServerError | None = None
        for attempt in range(retries + 1):
            reply = await ask(attempt)
            try:
                return read(reply, attempt)
            except RewardServerError as error:
                log.warning("qwen_vl, attempt %d of %d: %s", attempt + 1, retries + 1, error)
                problem = error
        raise RewardServerError(f"no usable answer in {retries + 1} attempts; last: {problem}") from problem


def _check_group(lr: np.ndarray, images: Sequence[np.ndarray], max_images: int) -> None:
    if not 1 <= len(images) <= max_images:
        raise ValueError(f"a group must have 1 to {max_images} images, got {len(images)}")
    for name, image in [("lr", lr), *((f"images[{i}]", image) for i, image in enumerate(images))]:
        _check_image(name, image)
    sizes = {image.shape for image in images}
    if len(sizes) > 1:
        raise ValueError(f"all images of a group must have one size, got {sorted(sizes)}")


def _check_image(name: str, image: np.ndarray) -> None:
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or image.size == 0:
        raise ValueError(f"{name} must be uint8 [height, width, 3], got {image.dtype} {image.shape}")


def process_environment(config: VisualExpertConfig) -> dict[str, str]:
    """Environment that vLLM and its child processes need; must be set before they are imported."""
    return {
        "OMP_NUM_THREADS": str(config.threads),
        # Several engines share a machine's cores; each would bind its threads to the same first ones.
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        # With one rank the engine's process works itself, as on a GPU; else the CPU platform starts another for that.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        # It would close the handlers that are there: Serve's log of requests ends, and its buffer grows instead.
        "VLLM_CONFIGURE_LOGGING": "0",
        "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "WARNING"),
        "VLLM_NO_USAGE_STATS": "1",
    }


def _start_engine(config: VisualExpertConfig) -> VlmEngine:
    os.environ.update(process_environment(config))
    options: dict[str, Any] = {
        "dtype": config.dtype,
        "seed": config.seed,
        "max_model_len": config.max_model_len,
        "max_num_seqs": config.max_num_seqs,
        "tensor_parallel_size": config.tensor_parallel_size,
        "gpu_memory_utilization": config.gpu_memory_utilization,
        "enforce_eager": config.enforce_eager,
        # A judged group and its reference, or the three pictures of a caption.
        "limit_mm_per_prompt": {"image": max(config.max_images + 1, len(caption_chat.ROUNDS)), "video": 0},
        # Every group is new: a cache of processed images would only hold memory.
        "mm_processor_cache_gb": 0,
    }
    if config.kv_cache_gib is not None:
        options["kv_cache_memory_bytes"] = int(config.kv_cache_gib * 2**30)
    return VlmEngine(config.model, options)
