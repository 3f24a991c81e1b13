"""One vision-language model in vLLM: chats in, text out. Images reach the processor as they came, never through an
encoder."""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from reward_servers.contract import RewardServerError


@dataclass(frozen=True)
class Decoding:
    """How an answer is decoded.

    Attributes:
        max_tokens: longest answer.
        schema: JSON schema that the answer must follow; None: free text.
        temperature: 0 is greedy.
        seed: of the draws, where the temperature is not 0.
    """

    max_tokens: int
    schema: Mapping[str, Any] | None = None
    temperature: float = 0.0
    seed: int | None = None


@dataclass(frozen=True)
class Reply:
    """An answer; ``complete`` is false where it was cut at ``max_tokens``."""

    text: str
    complete: bool


class VlmEngine:
    """A vLLM engine and the processor of its checkpoint. Starting takes as long as vLLM needs to load the model.

    Args:
        model: directory (or hub name) of a checkpoint with its processor.
        options: vLLM's ``AsyncEngineArgs`` beside the model.
    """

    def __init__(self, model: str, options: Mapping[str, Any]) -> None:
        from transformers import AutoProcessor
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        self.model = model
        self._processor = AutoProcessor.from_pretrained(model)
        self._engine = AsyncLLM.from_engine_args(
            AsyncEngineArgs(
                model=model,
                # Compact JSON: an unsure model must not fill the answer with spaces.
                structured_outputs_config={"backend": "xgrammar", "disable_any_whitespace": True},
                # A checkpoint's own sampling defaults (repetition penalty) must not bend greedy decoding.
                generation_config="vllm",
                disable_log_stats=True,
                **options,
            )
        )

    def render(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """The prompt text of a chat, up to where the assistant's answer begins."""
        return self._processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)

    async def answer(self, text: str, images: Sequence[Image.Image], decoding: Decoding) -> Reply:
        """The model's answer to a rendered chat with these images, in the order in which it names them.

        Raises:
            RewardServerError: the engine failed or refused, for one because the chat is longer than its context.
        """
        from vllm.exceptions import VLLMError

        prompt = {"prompt": text, "multi_modal_data": {"image": list(images)}}
        final = None
        try:
            (rendered,) = await self._engine.renderer.render_cmpl_async([prompt])
            async for output in self._engine.generate(rendered, _sampling(decoding), request_id=uuid.uuid4().hex):
                final = output
        # ValueError: the processor refused.
        except (VLLMError, ValueError) as error:
            raise RewardServerError(f"the engine of {self.model}: {type(error).__name__}: {error}") from error
        if final is None or not final.outputs:
            raise RewardServerError(f"the engine of {self.model} ended a request without an answer")
        (output,) = final.outputs
        return Reply(output.text, output.finish_reason != "length")

    async def ready(self) -> dict[str, Any]:
        """Model, process id, and versions of the engine as imported here."""
        import torch
        import transformers
        import vllm

        await self.check_health()
        return {
            "model": self.model,
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
            raise RewardServerError(f"the vLLM engine of {self.model} has died") from error

    def shutdown(self) -> None:
        """End the engine and its processes."""
        self._engine.shutdown()


def _sampling(decoding: Decoding) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

    schema = None if decoding.schema is None else StructuredOutputsParams(json=dict(decoding.schema))
    return SamplingParams(
        temperature=decoding.temperature,
        seed=decoding.seed,
        max_tokens=decoding.max_tokens,
        structured_outputs=schema,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )
