"""The formulas against counted tensors: what autograd keeps, what DeepSpeed holds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from learners.adapters import add_adapters
from learners.spec import LoraSpec
from rl_system.doctor import arithmetic
from rl_system.doctor.arithmetic import Micro, largest_micro, saved_by_layer
from rl_system.doctor.models import PolicyShape, read_policy
from tests.families import random_policy
from vlcot.policy import attention
from vlcot.policy.attention import SharedPrompts
from vlcot.policy.config import VlcotConfig
from vlcot.policy.model import VlcotForCausalLM
from vlcot.sequence import Layout

HIDDEN, WIDE, HEADS = 128, 320, 4
MICRO = Micro(prompts=2, prompt_ids=60, chains=6, chain_ids=90)


def kept(layers: int, dtype: torch.dtype, lora: LoraSpec | None = None) -> int:
    """Bytes that autograd keeps of a policy of so many layers, parameters aside, each storage once."""
    sizes = {"hidden_size": HIDDEN, "intermediate_size": WIDE, "num_hidden_layers": layers}
    sizes |= {"num_attention_heads": HEADS, "num_key_value_heads": HEADS}
    policy = VlcotForCausalLM(VlcotConfig(vocab_size=64, tie_word_embeddings=False, **sizes)).to(dtype)
    if lora is not None:
        add_adapters(policy, lora, seed=0)
        policy.enable_input_require_grads()
    parameters = {p.untyped_storage().data_ptr() for p in policy.parameters()}
    storages: dict[int, int] = {}
    alive = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        mask = tensor.shape[-2:] == (MICRO.chain_ids, MICRO.prompt_ids + MICRO.chain_ids)
        if storage.data_ptr() not in parameters and not mask:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    positions = [
        torch.arange(MICRO.prompt_ids).repeat(MICRO.prompts),
        torch.arange(MICRO.chain_ids).repeat(MICRO.chains),
    ]
    counts = (MICRO.chains // MICRO.prompts,) * MICRO.prompts
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = policy.model.embed_tokens(torch.zeros(1, MICRO.tokens, dtype=torch.long))
        rotary = policy.model.rotary_emb(hidden, position_ids=torch.cat(positions)[None])
        for layer in policy.model.layers:
            hidden = layer(
                hidden,
                position_embeddings=rotary,
                shared_prompts=SharedPrompts(counts, MICRO.prompt_ids, MICRO.chain_ids),
            )
            alive.append(hidden)
    return sum(storages.values())


@pytest.mark.unit
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cuda", [False, True], ids=["merged parts", "joined keys, as on CUDA"])
def test_a_layer_keeps_what_autograd_keeps(monkeypatch, dtype, cuda):
    if cuda:  # the same code on a CPU, whose kernel keeps a mask besides: left out, flash attention on CUDA has none
        monkeypatch.setattr(attention, "merged_parts", attention.joined_keys)
    shape = PolicyShape(64, HIDDEN, WIDE, 2, HEADS, HEADS, 1024, Layout())
    counted = kept(3, dtype) - kept(2, dtype)
    assert saved_by_layer(shape, MICRO, dtype.itemsize, cuda=cuda) == pytest.approx(counted, rel=0.015)


LORA = LoraSpec(rank=4, alpha=8.0)


@pytest.mark.unit
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "lora", [LORA, replace(LORA, targets=("v_proj", "up_proj")), replace(LORA, dropout=0.1)], ids=["all", "two", "drop"]
)
def test_a_layer_with_adapters_keeps_what_autograd_keeps(dtype, lora):
    shape = PolicyShape(64, HIDDEN, WIDE, 2, HEADS, HEADS, 1024, Layout())
    counted = kept(3, dtype, lora) - kept(2, dtype, lora)
    assert saved_by_layer(shape, MICRO, dtype.itemsize, cuda=False, lora=lora) == pytest.approx(counted, rel=0.015)


@pytest.mark.unit
def test_the_largest_micro_batch_is_that_of_the_batching():
    assert largest_micro(100, 200, 4, 4, 4096) == Micro(4, 100, 16, 200)  # 900 a group, all four of the rank
    assert largest_micro(100, 200, 4, 8, 2000).tokens == pytest.approx(2000)  # two groups, and shorter ones fill it
    assert largest_micro(100, 200, 4, 4, 550) == Micro(1, 100, 2, 200)  # a part of a group
    assert largest_micro(100, 200, 4, 4, 50) == Micro(1, 100, 1, 200)  # one chain goes alone


@pytest.mark.unit
def test_checkpointing_keeps_one_layer_and_the_inputs_of_all():
    shape = PolicyShape(64, HIDDEN, WIDE, 10, HEADS, HEADS, 1024, Layout())
    layer = saved_by_layer(shape, MICRO, 2, cuda=True)
    plain, kept_inputs = (
        arithmetic.activations(shape, MICRO, 2, checkpointing=on, cuda=True)["activations"] for on in (False, True)
    )
    assert plain - kept_inputs == 9 * layer - 10 * MICRO.tokens * HIDDEN * 2


@pytest.mark.engine
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_deepspeed_holds_what_the_plan_says(tmp_path, dtype):
    random_policy(tmp_path / "policy")
    found = subprocess.run(
        [sys.executable, "-m", "tests.rl_system.doctor.zero3_states", str(tmp_path / "policy"), dtype],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    planned = arithmetic.states(
        read_policy(tmp_path / "policy").parameters, 1, getattr(torch, dtype).itemsize, reference=False
    )
    counted = json.loads(found.stdout.splitlines()[-1])
    assert counted == {name: planned[name] for name in counted}
