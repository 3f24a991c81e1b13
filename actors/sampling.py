"""The samples of one prompt from a vLLM engine."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from actors.decoding import Decoding
from actors.errors import EngineLostError
from actors.samples import RawSample, request_seed
from actors.spec import RolloutSpec
from vlcot.groups import Prompt, VersionSpan


@dataclass(frozen=True, eq=False)
class Sampled:
    """G samples in order; ids of the prompt that vLLM had in its cache; ids that were sampled and thrown away."""

    samples: list[RawSample]
    cached_prompt_tokens: int
    discarded_tokens: int


async def sample_group(
    engine: Any,
    spec: RolloutSpec,
    prompt: Prompt,
    decoding: Decoding,
    turn_end: int,
    name: str,
    served: Callable[[], Awaitable[object]],
) -> Sampled:
    """Sample the G chains of ``prompt``, one vLLM request each.

    Where a push ends requests (``spec.on_push`` is ``restart``), each of those begins again with the same seed. The
    chains of a group that begin together share the prompt's key/value blocks, with nothing else.

    Args:
        engine: ``vllm.v1.engine.async_llm.AsyncLLM``.
        turn_end: id that ends a chain.
        name: of the group's requests, not used before.
        served: waits while weights are loaded.

    Raises:
        EngineDeadError: vLLM's engine died.
        EngineLostError: a request ended without a chain, or ``served`` raises it.
    """
    from vllm import SamplingParams
    from vllm.inputs.engine import tokens_input
    from vllm.sampling_params import RequestOutputKind

    seed, ids = request_seed(spec.seed, prompt.seed), prompt.ids.tolist()
    cached = discarded = 0

    async def chain(index: int) -> RawSample:
        nonlocal cached, discarded
        params = SamplingParams(
            temperature=decoding.temperature,
            extra_args=decoding.extra_args(),
            max_tokens=spec.max_new_tokens,
            seed=seed + index,
            stop_token_ids=[turn_end],
            ignore_eos=True,  # a chain ends with the turn; </s> is in no support
            logprobs=0,
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        attempt = 0
        while True:
            await served()
            # The attempt, not the version: a learner that was restarted may push the same number again.
            tokens = tokens_input(ids, cache_salt=f"{name}-{attempt}")
            request_id, last = f"{name}-{index}-{attempt}", None
            async for output in engine.generate(tokens, params, request_id=request_id):
                last = output
            if last is None:
                raise EngineLostError(f"vLLM ended request {request_id} without an answer")
            cached += last.num_cached_tokens or 0
            completion = last.outputs[0]
            if completion.finish_reason in ("stop", "length"):
                return _raw_sample(completion)
            if completion.finish_reason != "abort":
                raise EngineLostError(f"vLLM ended request {request_id} with {completion.finish_reason!r}")
            discarded += len(completion.token_ids)
            attempt += 1

    chains = [asyncio.create_task(chain(index)) for index in range(spec.group_size)]
    try:
        samples = await asyncio.gather(*chains)
    finally:
        for task in chains:  # one that failed leaves the others behind
            task.cancel()
    return Sampled(samples, cached, discarded)


def _raw_sample(completion: Any) -> RawSample:
    spans = tuple(VersionSpan(int(s.version), s.start, s.end) for s in completion.weight_versions or ())
    return RawSample(list(completion.token_ids), completion.logprobs.logprobs, spans, completion.finish_reason)
