"""The published models at full size, without their values: every name, every shape, every count."""

from __future__ import annotations

import json

import pytest
import torch

from tests.vlcot.weight_import import published
from vlcot.policy.config import VlcotConfig
from vlcot.policy.model import VlcotForCausalLM
from vlcot.weight_import import convert
from vlcot.weight_import.chameleon import policy_plan
from vlcot.weight_import.llamagen import VQ_8, VQ_16, vq_plan
from vlcot.weight_import.source import Checkpoint

pytestmark = pytest.mark.unit


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return published.full_tokenizer(tmp_path_factory.mktemp("tokenizer") / "text_tokenizer.json")


@pytest.mark.parametrize("rows", [73_728, 65_536], ids=["PURE", "Lumina-mGPT"])
def test_the_policy_has_7_080_775_680_parameters_and_nothing_is_missing_or_extra(tmp_path, tokenizer, rows):
    published.sparse_safetensors(tmp_path / "model.safetensors", published.full_policy_shapes(rows))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "chameleon", "vocab_size": rows}))
    checkpoint = Checkpoint.open(tmp_path)
    plan = policy_plan(checkpoint, tokenizer)
    convert.verify(checkpoint, plan)

    with torch.device("meta"):
        model = VlcotForCausalLM(VlcotConfig(**plan.config))
    ours = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert {c.target: c.shape for c in plan.conversions.values()} == ours
    assert plan.parameters == sum(p.numel() for p in model.parameters()) == 7_080_775_680
    dropped = set(checkpoint.tensors) - set(plan.conversions)
    assert dropped and all(name.startswith("model.vqmodel.") for name in dropped)
    assert plan.config["dtype"] == "bfloat16"
    assert any("4..8195, 65536..73727" in note for note in plan.notes)


@pytest.mark.parametrize(("config", "parameters"), [(VQ_8, 70.11), (VQ_16, 71.88)], ids=["VQ-8", "VQ-16"])
def test_the_image_tokenizer_has_its_published_size_and_nothing_is_missing_or_extra(tmp_path, config, parameters):
    state = published.llamagen_state(config, "meta")
    file = published.sparse_safetensors(tmp_path / "vq.safetensors", {n: tuple(t.shape) for n, t in state.items()})
    plan = vq_plan(config)
    convert.verify(Checkpoint.open(file), plan)

    ours = {name: tuple(tensor.shape) for name, tensor in published.janus(config, "meta").state_dict().items()}
    assert {c.target: c.shape for c in plan.conversions.values()} == ours
    assert round(plan.parameters / 1e6, 2) == parameters
    if config is VQ_8:
        assert (len(state), len(plan.conversions)) == (300, 299)
