"""Settings, incoming pushes and head sharding, without an engine."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from actors.errors import PushLostError
from actors.push import IncomingPush
from actors.samples import RawSample, build_samples, request_seed
from actors.spec import RolloutSpec
from actors.vllm_plugin.model import own_heads
from actors.vllm_plugin.weight_receiver import UpdateInfo
from tests.families import random_policy
from vlcot.groups import VersionSpan
from vlcot.weights import TensorSpec, checksums, pack, plan_buckets

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("group_size", 0),
        ("max_new_tokens", -1),
        ("threads", 1.5),
        ("temperature", 0.0),
        ("temperature", float("nan")),
        ("kv_cache_gib", 0.0),
        ("dtype", "float8"),
        ("on_push", "wait"),
        ("gpu_memory_utilization", 1.5),
        ("seed", -1),
    ],
)
def test_a_wrong_setting_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=f"rollout.{name} must"):
        RolloutSpec(**{"policy": "p", "image_tokenizer": "t", name: value})


def test_a_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"rollout\.policy: no checkpoint at"):
        RolloutSpec(str(tmp_path / "nowhere"), str(tmp_path)).check_paths()


def test_pitfall_27_neighbouring_prompts_share_no_sample_seed():
    seeds = [request_seed(run, prompt) + i for run in (0, 1) for prompt in range(500) for i in range(16)]
    assert len(set(seeds)) == len(seeds) and max(seeds) < 2**63
    assert request_seed(3, 4) == request_seed(3, 4) != request_seed(4, 3)


def test_a_push_travels_through_files_and_is_gone_afterwards():
    tensors = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}
    layout = plan_buckets([TensorSpec("a", (2, 3), "float32"), TensorSpec("b", (4,), "bfloat16")], 24)
    push, sums = IncomingPush(1, layout), checksums(tensors.items())
    push.write(1, pack(layout[1], tensors))
    with pytest.raises(PushLostError, match=r"\[0\]"):
        push.check(sums)
    with pytest.raises(ValueError, match="holds 8 bytes of uint8, the layout says 24"):
        push.write(0, pack(layout[1], tensors))
    push.write(0, pack(layout[0], tensors))
    assert push.check(sums) == sums == push.update_info()["checksums"]
    with pytest.raises(ValueError, match="tensor b: the checksum of what arrived is not the sender's"):
        push.check(sums | {"b": 1})
    with pytest.raises(ValueError, match="tensor c: "):
        push.check(sums | {"c": 1})
    arrived = dict(UpdateInfo(**push.update_info()).tensors())
    assert all(torch.equal(arrived[name], tensor) for name, tensor in tensors.items())
    with pytest.raises(ValueError, match="bucket 2 of a push of 2"):
        push.write(2, np.zeros(1, np.uint8))
    push.discard()
    assert not push.directory.exists()


@pytest.mark.parametrize(("heads", "world_size"), [(8, 1), (8, 2), (8, 4), (2, 4)])
def test_each_rank_has_the_norm_rows_of_its_own_heads(heads, world_size):
    """Ranks tile the heads; with fewer key heads than ranks, neighbours share one (vLLM replicates)."""
    weight = torch.arange(heads * 3.0).reshape(heads, 3)
    per_rank = max(1, heads // world_size)
    rows = torch.cat([own_heads(weight, per_rank, rank, world_size) for rank in range(world_size)])
    assert torch.equal(rows, weight.repeat_interleave(max(1, world_size // heads), 0))


def test_a_sampler_that_leaves_the_grammar_or_its_spans_is_an_error(tmp_path):
    builder = random_policy(tmp_path / "policy").builder
    text, span = builder.vocabulary.text_ids[:2].tolist(), VersionSpan(0, 0, 2)
    with pytest.raises(ValueError, match="not in support TEXT"):
        build_samples(builder, None, [RawSample([text[0], builder.vocabulary.pad], [0.0] * 2, (span,), "length")])
    with pytest.raises(ValueError, match="2 ids came with 1 log-probs"):
        build_samples(builder, None, [RawSample(text, [0.0], (span,), "length")])
    with pytest.raises(ValueError, match="versions up to 1"):
        build_samples(builder, None, [RawSample(text, [0.0] * 2, (VersionSpan(0, 0, 1),), "length")])
    with pytest.raises(ValueError, match="do not follow"):
        gap = (VersionSpan(0, 0, 1), VersionSpan(1, 0, 2))
        build_samples(builder, None, [RawSample(text, [0.0] * 2, gap, "length")])
