"""The visual expert: Qwen2.5-VL in vLLM scores the images of a group against their LR image.

One request shows the LR image and the whole group. Decoding is greedy and vLLM's structured output (xgrammar) forces
the JSON schema of :mod:`reward_servers.expert_chat`. Images reach the processor as they came, never through an encoder.
"""

from __future__ import annotations

import asyncio
import logging
import os
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from reward_servers.contract import Judgement, RewardServerError
from reward_servers.expert_chat import (
    MAX_SCORE,
    SCORE_NAMES,
    ExpertPrompt,
    answer_schema,
    average,
    chat,
    in_sent_order,
    parse_answer,
    shown_orders,
    write_answer,
)

DTYPES = ("float32", "bfloat16", "float16", "auto")

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
        repeats: requests per group, each in another image order; their scores are averaged.
        retries: further requests, in new orders, for an answer that cannot be used.
        threads: CPU threads of the engine.
        max_num_seqs: requests that the engine runs at the same time.
        tensor_parallel_size: devices.
        gpu_memory_utilization: share of the device that vLLM may take.
        enforce_eager: no compilation, no CUDA graphs: starts faster.
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

    def __post_init__(self) -> None:
        at_least = {"seed": 0, "retries": 0}
        positive = ("max_images", "max_model_len", "repeats", "threads", "max_num_seqs", "tensor_parallel_size")
        for name, low in {**at_least, **dict.fromkeys(positive, 1)}.items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < low:
                raise ValueError(f"qwen_vl.{name} must be a whole number of at least {low}, got {value!r}")
        if self.dtype not in DTYPES:
            raise ValueError(f"qwen_vl.dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if self.kv_cache_gib is not None and not 0 < self.kv_cache_gib < float("inf"):
            raise ValueError(f"qwen_vl.kv_cache_gib must be positive or null, got {self.kv_cache_gib}")
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ValueError(f"qwen_vl.gpu_memory_utilization must lie in (0, 1], got {self.gpu_memory_utilization}")


class VisualExpert:
    """Judges groups of restorations. Starting takes as long as vLLM needs to load the model.

    Raises:
        ValueError: the model's directory has no ``config.json``, or its ``expert_prompt.json`` is not one.
    """

    def __init__(self, config: VisualExpertConfig) -> None:
        if Path(config.model).is_dir() and not (Path(config.model) / "config.json").is_file():
            raise ValueError(f"qwen_vl.model: no checkpoint at {config.model} (config.json is missing)")
        self.config = config
        self._prompt = config.prompt or ExpertPrompt.of_checkpoint(config.model)
        os.environ.update(process_environment(config))
        from transformers import AutoProcessor

        self._processor = AutoProcessor.from_pretrained(config.model)
        self._questions: dict[int, tuple[str, Any]] = {}
        self._engine = _start_engine(config)

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
        self._check(lr, images)
        orders = shown_orders(len(images), self.config.repeats, seed)
        height, width = images[0].shape[:2]
        reference = Image.fromarray(lr).resize((width, height), Image.Resampling.BICUBIC)
        pictures = [Image.fromarray(np.ascontiguousarray(image)) for image in images]
        rounds = [self._round(reference, pictures, order, (seed, number)) for number, order in enumerate(orders)]
        return average(await asyncio.gather(*rounds))

    async def ready(self) -> dict[str, Any]:
        """Model, process id, and versions of the engine as imported here."""
        import torch
        import transformers
        import vllm

        await self.check_health()
        return {
            "model": self.config.model,
            "vllm": vllm.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "pid": os.getpid(),
        }

    async def check_health(self) -> None:
        """Raises RewardServerError if the engine cannot answer any more."""
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            await self._engine.check_health()
        except EngineDeadError as error:
            raise RewardServerError("the visual expert's vLLM engine has died") from error

    def shutdown(self) -> None:
        """End the engine and its processes."""
        self._engine.shutdown()

    async def _round(
        self, reference: Image.Image, pictures: Sequence[Image.Image], order: list[int], key: tuple[int, int]
    ) -> list[Judgement]:
        """One usable answer about the group, in the order sent; a retry shows another order."""
        problem: RewardServerError | None = None
        for attempt in range(self.config.retries + 1):
            if attempt:
                order = shown_orders(len(pictures), 1, (*key, attempt))[0]
            answer = await self._ask([reference, *(pictures[index] for index in order)])
            try:
                return in_sent_order(parse_answer(answer, len(pictures)), order)
            except RewardServerError as error:
                log.warning("visual expert, attempt %d of %d: %s", attempt + 1, self.config.retries + 1, error)
                problem = error
        raise RewardServerError(f"no usable answer in {self.config.retries + 1} attempts; last: {problem}") from problem

    async def _ask(self, shown: list[Image.Image]) -> str:
        """The engine's answer to the chat about ``shown``: reference, then restorations."""
        from vllm.exceptions import VLLMError

        text, sampling = self._question(len(shown) - 1)
        prompt = {"prompt": text, "multi_modal_data": {"image": shown}}
        final = None
        try:
            (rendered,) = await self._engine.renderer.render_cmpl_async([prompt])
            async for output in self._engine.generate(rendered, sampling, request_id=uuid.uuid4().hex):
                final = output
        # ValueError: the processor refused, for one because the chat is longer than max_model_len.
        except (VLLMError, ValueError) as error:
            raise RewardServerError(f"the visual expert's engine: {type(error).__name__}: {error}") from error
        if final is None or not final.outputs:
            raise RewardServerError("the visual expert's engine ended a request without an answer")
        return final.outputs[0].text

    def _question(self, count: int) -> tuple[str, Any]:
        """Prompt text and sampling parameters for groups of ``count``."""
        if count not in self._questions:
            from vllm import SamplingParams
            from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

            text = self._processor.apply_chat_template(
                chat(self._prompt, count), add_generation_prompt=True, tokenize=False
            )
            longest = write_answer([dict.fromkeys(SCORE_NAMES, MAX_SCORE)] * count)
            sampling = SamplingParams(
                temperature=0.0,
                # Room for the longest answer even where a model spells it letter by letter.
                max_tokens=len(longest) + 8,
                structured_outputs=StructuredOutputsParams(json=answer_schema(count)),
                output_kind=RequestOutputKind.FINAL_ONLY,
            )
            self._questions[count] = (text, sampling)
        return self._questions[count]

    def _check(self, lr: np.ndarray, images: Sequence[np.ndarray]) -> None:
        if not 1 <= len(images) <= self.config.max_images:
            raise ValueError(f"a group must have 1 to {self.config.max_images} images, got {len(images)}")
        for name, image in [("lr", lr), *((f"images[{i}]", image) for i, image in enumerate(images))]:
            if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or image.size == 0:
                raise ValueError(f"{name} must be uint8 [height, width, 3], got {image.dtype} {image.shape}")
        sizes = {image.shape for image in images}
        if len(sizes) > 1:
            raise ValueError(f"all images of a group must have one size, got {sorted(sizes)}")


def process_environment(config: VisualExpertConfig) -> dict[str, str]:
    """Environment that vLLM and its child processes need; must be set before they are imported."""
    return {
        "OMP_NUM_THREADS": str(config.threads),
        # Several engines share a machine's cores; each would bind its threads to the same first ones.
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "WARNING"),
        "VLLM_NO_USAGE_STATS": "1",
    }


def _start_engine(config: VisualExpertConfig) -> Any:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    memory = {} if config.kv_cache_gib is None else {"kv_cache_memory_bytes": int(config.kv_cache_gib * 2**30)}
    return AsyncLLM.from_engine_args(
        AsyncEngineArgs(
            model=config.model,
            dtype=config.dtype,
            seed=config.seed,
            max_model_len=config.max_model_len,
            max_num_seqs=config.max_num_seqs,
            tensor_parallel_size=config.tensor_parallel_size,
            gpu_memory_utilization=config.gpu_memory_utilization,
            enforce_eager=config.enforce_eager,
            limit_mm_per_prompt={"image": config.max_images + 1, "video": 0},
            # Every group is new: a cache of processed images would only hold memory.
            mm_processor_cache_gb=0,
            # Compact JSON: an unsure model must not fill the answer with spaces.
            structured_outputs_config={"backend": "xgrammar", "disable_any_whitespace": True},
            # A checkpoint's own sampling defaults (repetition penalty) must not bend greedy decoding.
            generation_config="vllm",
            disable_log_stats=True,
            **memory,
        )
    )
