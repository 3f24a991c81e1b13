"""LoRA under ZeRO-3 in processes of its own, against plain torch."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn.utils import parametrize

from learners.adapters import Weight
from learners.spec import LearnerSpec, LoraSpec
from tests.learners.ranks import run_ranks
from tests.learners.synthetic import Oracle, PlainPolicy, scored_groups, snapshot
from tests.learners.zero3_lora import LoraJob
from vlcot.groups import ScoredGroup
from vlcot.policy.model import VlcotForCausalLM
from vlcot.weights import checksums

LORA = LoraSpec(rank=4, alpha=8.0, targets=("q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"))
BOTH = pytest.mark.parametrize("ranks", [1, 2])


@pytest.fixture(scope="module")
def lora_spec(spec: LearnerSpec) -> LearnerSpec:
    """The policy is its own reference; a rate at which B is no rounding error after a step."""
    return replace(spec, reference_path=spec.policy_path, learning_rate=2e-2, lora=LORA)


@pytest.fixture(scope="module")
def groups(lora_spec: LearnerSpec) -> list[ScoredGroup]:
    return scored_groups(PlainPolicy(lora_spec.policy_path, lora_spec.temperature), seed=1, invalid=1)


@pytest.fixture(scope="module")
def runs(lora_spec, groups, tmp_path_factory) -> dict[tuple[int, str], Any]:
    directory = tmp_path_factory.mktemp("lora")
    found = {}
    for ranks in (1, 2):
        specs = {"plain": lora_spec}
        if ranks == 2:
            dropped = replace(lora_spec, lora=replace(LORA, dropout=0.3))
            lean = replace(lora_spec, activation_checkpointing=True)
            specs |= {"lean": lean, "dropped": dropped, "resumed": dropped}
        jobs = {
            name: LoraJob(of, groups, directory / f"{ranks}-{name}.pt", name == "resumed", name == "plain")
            for name, of in specs.items()
        }
        run_ranks("tests.learners.zero3_lora", list(jobs.values()), ranks, directory)
        found |= {(ranks, name): torch.load(job.output) for name, job in jobs.items()}
    found["exported"] = directory / "exported"
    return found


class Adapted(nn.Module):
    """W + scale B A, by hand."""

    def __init__(self, a: torch.Tensor, b: torch.Tensor, scale: float) -> None:
        super().__init__()
        self.a, self.b, self.scale = nn.Parameter(a.clone()), nn.Parameter(b.clone()), scale

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + self.scale * (self.b @ self.a)


def adapted(model: VlcotForCausalLM, adapters: dict[str, torch.Tensor]) -> dict[str, nn.Parameter]:
    """Put ``adapters`` into ``model``; the factors by name."""
    factors = {}
    for name, module in list(model.named_modules()):
        if name.rpartition(".")[2] not in LORA.targets:
            continue
        names = [f"{name}.lora_{factor}.default.weight" for factor in "AB"]
        merge = Adapted(*(adapters[n] for n in names), LORA.alpha / LORA.rank)
        parametrize.register_parametrization(module, "weight", merge)
        factors |= dict(zip(names, (merge.a, merge.b), strict=True))
    return factors


@pytest.mark.engine
@BOTH
def test_at_the_start_the_policy_is_its_base_bit_for_bit(runs, lora_spec, ranks) -> None:
    run = runs[ranks, "plain"]
    base = snapshot(PlainPolicy(lora_spec.policy_path, 1.0))
    assert list(run["start"]) == list(base) and checksums(run["start"].items()) == checksums(base.items())
    assert run["metrics"][0]["grpo/kl"] == 0 and run["metrics"][0]["mismatch/max"] < 1e-5
    assert run["metrics"][1]["grpo/kl"] > 0
    for name, factor in run["first"].items():
        assert bool(factor.any()) == ("lora_A" in name)
        assert torch.equal(factor, runs[1, "plain"]["first"][name])


@pytest.mark.engine
@BOTH
def test_gradient_of_adapters_equals_plain_torch(runs, lora_spec, groups, ranks) -> None:
    """Of the second step, in which B is not zero and the KL is to the base."""
    run, oracle = runs[ranks, "plain"], Oracle(lora_spec)
    oracle.policy.model.requires_grad_(False)
    factors = adapted(oracle.policy.model, run["adapters"])
    oracle.loss(groups).backward()
    assert run["gradient"].keys() == factors.keys()
    assert len(factors) == 2 * len(LORA.targets) * oracle.policy.model.config.num_hidden_layers
    for name, factor in factors.items():
        difference = run["gradient"][name] - factor.grad
        assert difference.abs().max() <= 1e-6, name
        assert difference.norm() <= 1e-5 * factor.grad.norm(), name


@pytest.mark.engine
@BOTH
def test_only_adapters_move_and_only_they_have_an_optimizer(runs, lora_spec, ranks) -> None:
    run = runs[ranks, "plain"]
    base = snapshot(PlainPolicy(lora_spec.policy_path, 1.0))
    assert checksums(run["base"].items()) == checksums(base.items())
    assert all((run["trained"][name] - factor).any() for name, factor in run["first"].items())
    values = sum(factor.numel() for factor in run["first"].values())
    assert values <= ranks * run["optimizer"] <= values + 2 * ranks * len(run["first"])  # shards are padded


@pytest.mark.engine
@BOTH
def test_a_push_has_the_merged_weights(runs, lora_spec, ranks) -> None:
    run = runs[ranks, "plain"]
    moved = 0
    for name, weight in snapshot(PlainPolicy(lora_spec.policy_path, 1.0)).items():
        stem = name.removesuffix(".weight")
        if f"{stem}.lora_A.default.weight" in run["trained"]:
            a, b = (run["trained"][f"{stem}.lora_{factor}.default.weight"].double() for factor in "AB")
            expected = (weight.double() + LORA.alpha / LORA.rank * b @ a).float()
            assert (expected - weight).abs().max() > 1e-2, name
            torch.testing.assert_close(run["pushed"][name], expected, rtol=0, atol=1e-7, msg=name)
            moved += 1
        else:
            assert torch.equal(run["pushed"][name], weight), name
    assert moved == len(run["trained"]) / 2


@pytest.mark.engine
def test_a_resumed_run_has_the_bits_of_the_uninterrupted_one(runs) -> None:
    """With dropout, which a repeated step must draw alike."""
    whole, resumed = runs[2, "dropped"], runs[2, "resumed"]
    for kind in ("trained", "pushed", "gradient"):
        assert checksums(whole[kind].items()) == checksums(resumed[kind].items()), kind
        assert checksums(whole[kind].items()) != checksums(runs[2, "plain"][kind].items()), kind
    assert whole["metrics"][1]["grpo/loss"] == resumed["metrics"][1]["grpo/loss"]


@pytest.mark.engine
def test_checkpointed_activations_change_nothing(runs) -> None:
    assert checksums(runs[2, "lean"]["trained"].items()) == checksums(runs[2, "plain"]["trained"].items())


@pytest.mark.engine
def test_the_exported_policy_is_the_merged_one_beside_files_that_peft_reads(runs, lora_spec) -> None:
    from peft import PeftModel

    path, pushed = runs["exported"], runs[2, "plain"]["pushed"]
    model = VlcotForCausalLM.from_pretrained(path)
    assert checksums(model.named_parameters()) == checksums(pushed.items())
    base = VlcotForCausalLM.from_pretrained(lora_spec.policy_path)
    assert json.loads((path / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
    merged = PeftModel.from_pretrained(base, path / "adapter").merge_and_unload()
    for name, parameter in merged.named_parameters():
        torch.testing.assert_close(parameter, pushed[name], rtol=0, atol=1e-6, msg=name)
    assert set(load_file(path / "model.safetensors")) == set(pushed)


@pytest.mark.unit
def test_a_weight_is_merged_in_float32_and_rounded_once() -> None:
    generator = torch.Generator().manual_seed(0)
    base, a, b = (torch.randn(shape, generator=generator).bfloat16() for shape in ((6, 5), (2, 5), (6, 2)))
    base[0, 0] = -0.0
    exact = (base.double() + 0.3 * (b.double() @ a.double())).float().bfloat16()
    merged = Weight(tuple(nn.Parameter(x) for x in (base, a, b)), 0.3).value()
    assert torch.equal(merged, exact) and not torch.equal(merged, base + (0.3 * (b @ a)))
    untrained = Weight(tuple(nn.Parameter(x) for x in (base, a, torch.zeros_like(b))), 0.3).value()
    assert checksums([("w", untrained)]) == checksums([("w", base)])  # -0 too


WIDTHS = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 128}


@pytest.mark.unit
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": 0}, r"learner\.lora\.rank=0 must be at least 1"),
        ({"alpha": 0.0}, r"learner\.lora\.alpha=0\.0 must be a positive number"),
        ({"dropout": 1.0}, r"learner\.lora\.dropout=1\.0 must be in \[0, 1\)"),
        ({"targets": ("q_proj", "lm_head")}, r"targets=\['q_proj', 'lm_head'\] must be some of q_proj, k_proj, v_proj"),
        ({"targets": ()}, r"targets=\[\] must be some of"),
        ({"targets": ("q_proj", "q_proj")}, "must be each layer once"),
    ],
)
def test_an_impossible_adapter_is_refused_by_name(change, message) -> None:
    with pytest.raises(ValueError, match=message):
        replace(LORA, **change)


@pytest.mark.unit
def test_a_rank_that_is_too_large_is_refused_with_the_layer() -> None:
    replace(LORA, rank=64, targets=("q_proj",)).check(WIDTHS)
    replace(LORA, rank=32, targets=("k_proj",)).check(WIDTHS)
    with pytest.raises(ValueError, match="rank=33 is too large for k_proj, a matrix of 32 x 64: it must be at most 32"):
        replace(LORA, rank=33, targets=("q_proj", "k_proj")).check(WIDTHS)
    with pytest.raises(ValueError, match="rank=65 is too large for down_proj, a matrix of 64 x 128"):
        replace(LORA, rank=65, targets=("down_proj",)).check(WIDTHS)


@pytest.mark.unit
def test_lora_has_no_other_reference_and_nothing_to_offload() -> None:
    with pytest.raises(ValueError, match="offload_reference has nothing to move"):
        LearnerSpec("p", "p", 1, 1, 1.0, 0, offload_reference=True, lora=LORA)
    with pytest.raises(ValueError, match="reference_path must be policy_path=p, not q"):
        LearnerSpec("p", "q", 1, 1, 1.0, 0, lora=LORA)
