"""A small Chameleon checkpoint, imported, computes what transformers' own Chameleon computes."""

from __future__ import annotations

import json

import pytest
import torch

from tests.vlcot.weight_import import published
from vlcot.policy.family import Family
from vlcot.policy.model import VlcotForCausalLM
from vlcot.weight_import import convert
from vlcot.weight_import.chameleon import policy_plan
from vlcot.weight_import.source import Checkpoint

pytestmark = pytest.mark.unit


def imported(source, output, tokenizer, limit=convert.SHARD_BYTES):
    checkpoint = Checkpoint.open(source)
    plan = policy_plan(checkpoint, tokenizer, published.CODEBOOK, published.LAYOUT)
    convert.write(checkpoint, plan, output, report=lambda _: None, limit=limit)
    convert.check(checkpoint, plan, output)
    model, loading = VlcotForCausalLM.from_pretrained(output, dtype="auto", output_loading_info=True)
    assert not any(loading.values()), loading
    return model.eval()


@torch.no_grad()
def logits(model, ids):
    return model(input_ids=ids).logits


@pytest.fixture
def ids():
    return torch.randint(0, published.ROWS, (2, 24), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("ranks", [1, 2], ids=["norms of one rank", "norms of two ranks"])
def test_logits_are_those_of_the_source_layout(tmp_path, ids, ranks):
    _, reference = published.small_policy(tmp_path / "source", ranks)
    tokenizer = published.small_tokenizer(tmp_path / "t.json", known=published.CODEBOOK)
    model = imported(tmp_path / "source", tmp_path / "ours", tokenizer, limit=40_000)
    assert (tmp_path / "ours" / "model.safetensors.index.json").is_file()
    torch.testing.assert_close(logits(model, ids), logits(reference, ids), rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        reference.model.layers[0].self_attn.q_norm.weight[-1] *= 2  # the comparison sees every head's norm
    assert (logits(model, ids) - logits(reference, ids)).abs().max() > 1e-2


def test_torch_shards_give_the_same_weights(tmp_path, ids):
    tensors, reference = published.small_policy(tmp_path / "source")
    for file in (tmp_path / "source").glob("model*"):
        file.unlink()
    published.write_shards(tmp_path / "source", tensors, torch_files=True)
    tokenizer = published.small_tokenizer(tmp_path / "t.json", known=published.CODEBOOK)
    model = imported(tmp_path / "source", tmp_path / "ours", tokenizer)
    torch.testing.assert_close(logits(model, ids), logits(reference, ids), rtol=1e-4, atol=1e-4)


def test_growth_keeps_old_logits_and_gives_new_codes_the_mean_of_the_known_ones(tmp_path, ids):
    tensors, reference = published.small_policy(tmp_path / "source")
    model = imported(tmp_path / "source", tmp_path / "ours", published.small_tokenizer(tmp_path / "t.json"))
    family = Family.from_pretrained(tmp_path / "ours")
    assert family.vocabulary.size == published.GROWN_ROWS and len(family.vocabulary.image_ids) == published.CODEBOOK

    ours, theirs = logits(model, ids), logits(reference, ids)
    torch.testing.assert_close(ours[..., : published.ROWS], theirs, rtol=1e-4, atol=1e-4)
    known = theirs[..., 4 : 4 + published.KNOWN].mean(-1, keepdim=True)
    torch.testing.assert_close(ours[..., published.ROWS :], known.expand(-1, -1, 16), rtol=1e-4, atol=1e-4)

    embedding = model.model.embed_tokens.weight.detach()
    images, new = tensors["model.embed_tokens.weight"][4 : 4 + published.KNOWN], embedding[published.ROWS :]
    assert len(torch.unique(new, dim=0)) == len(new)
    assert abs(float(((new - images.mean(0)) / images.std(0)).std()) - 1) < 0.1
    card = (tmp_path / "ours" / "README.md").read_text()
    assert "grown from 340 to 356 rows" in card and "seed 0" in card


def test_bfloat16_stays_bfloat16_bit_for_bit(tmp_path):
    tensors, _ = published.small_policy(tmp_path / "source")
    tensors = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    published.write_shards(tmp_path / "source", tensors)
    tokenizer = published.small_tokenizer(tmp_path / "t.json", known=published.CODEBOOK)
    model = imported(tmp_path / "source", tmp_path / "ours", tokenizer)
    assert model.dtype is torch.bfloat16
    for name, parameter in model.state_dict().items():
        if "_norm." not in name or "self_attn" not in name:
            assert torch.equal(parameter, tensors[name]), name


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model_type": "llama"}, "model_type is 'llama'"),
        ({"swin_norm": True}, "swin_norm is True"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings is True"),
        ({"num_hidden_layers": "two"}, "num_hidden_layers is 'two'"),
        ({"model_parallel_size": 3}, "do not divide into model_parallel_size"),
    ],
)
def test_a_configuration_that_our_policy_cannot_be_is_refused_by_its_key(tmp_path, change, said):
    published.small_policy(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=said):
        policy_plan(Checkpoint.open(tmp_path), published.small_tokenizer(tmp_path / "t.json"), published.CODEBOOK)
