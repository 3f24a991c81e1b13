"""The requests of a group, on an engine that is played; the real one is in test_engine.py."""

from __future__ import annotations

import asyncio
import copy
from types import SimpleNamespace

import numpy as np
import pytest

from actors.decoding import Decoding
from actors.errors import EngineLostError
from actors.samples import request_seed
from actors.sampling import sample_group
from actors.spec import RolloutSpec
from vlcot.groups import Prompt, VersionSpan

pytestmark = pytest.mark.unit
SPEC = RolloutSpec("policy", "vq", group_size=3, seed=5, on_push="restart")
PROMPT = Prompt("group", "row", 9, np.arange(4), np.zeros((2, 2, 3), np.uint8), "")


class PlayedEngine:
    """Answers each request with the next of ``endings``: ids and finish reason; without one it never ends."""

    def __init__(self, *endings) -> None:
        self.endings = list(endings)
        self.asked = []
        self.ended = []

    async def generate(self, tokens, params, request_id):
        self.asked.append((request_id, tokens["cache_salt"], params.seed))
        try:
            if not self.endings:
                await asyncio.Event().wait()
            count, reason = self.endings.pop(0)
            span = SimpleNamespace(version="4", start=0, end=count)
            logprobs = SimpleNamespace(logprobs=[-1.0] * count)
            completion = SimpleNamespace(
                token_ids=range(count), logprobs=logprobs, weight_versions=[span], finish_reason=reason
            )
            yield SimpleNamespace(outputs=[completion], num_cached_tokens=2)
        finally:
            self.ended.append(request_id)


async def nothing_is_loaded():
    return None


def sample(engine, served=nothing_is_loaded):
    return asyncio.run(
        asyncio.wait_for(sample_group(engine, SPEC, PROMPT, Decoding(temperature=1.0), 7, "n", served), 10)
    )


def test_an_ended_chain_begins_again_with_its_seed_and_behind_no_old_blocks():
    engine = PlayedEngine((5, "stop"), (3, "abort"), (4, "stop"), (6, "length"))
    sampled = sample(engine)
    first, second, third = sampled.samples
    assert [len(s.ids) for s in sampled.samples] == [5, 4, 6] and second.versions == (VersionSpan(4, 0, 4),)
    assert (first.finish_reason, third.finish_reason) == ("stop", "length")
    assert (sampled.discarded_tokens, sampled.cached_prompt_tokens) == (3, 8)
    seed = request_seed(5, 9)
    assert engine.asked == [
        ("n-0-0", "n-0", seed),
        ("n-1-0", "n-0", seed + 1),
        ("n-1-1", "n-1", seed + 1),
        ("n-2-0", "n-0", seed + 2),
    ]


def test_a_chain_that_fails_takes_the_others_with_it():
    engine = PlayedEngine((5, "error"))
    with pytest.raises(EngineLostError, match="n-0-0 with 'error'"):
        sample(engine)
    assert sorted(engine.ended) == ["n-0-0", "n-1-0", "n-2-0"]


def test_chains_do_not_begin_again_on_weights_that_a_push_broke():
    answers = iter([None] * 3)

    async def broken_afterwards():
        try:
            return next(answers)
        except StopIteration:
            raise EngineLostError("loading weights 5 failed") from None

    engine = PlayedEngine((5, "abort"), (5, "abort"), (5, "abort"))
    with pytest.raises(EngineLostError, match="loading weights 5 failed"):
        sample(engine, broken_afterwards)
    assert len(engine.asked) == 3


def test_what_was_loaded_is_compared_by_name():
    from actors.vllm_plugin.weight_receiver import _compare

    sent = {"a": 1, "b": 2}
    _compare(copy.copy(sent), sent)
    for loaded, message in (
        ({"a": 1}, "tensor b: the push has it, the model has not"),
        ({"a": 1, "b": 2, "c": 3}, "tensor c: the model has it, the push has not"),
        ({"a": 1, "b": 3}, "tensor b: the checksum of the loaded parameter is not"),
    ):
        with pytest.raises(ValueError, match=message):
            _compare(loaded, sent)
