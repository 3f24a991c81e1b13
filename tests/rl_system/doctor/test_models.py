"""Sizes against independent numbers: cards, files, published counts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from rl_system.doctor import models
from rl_system.doctor.arithmetic import states
from rl_system.doctor.models import PolicyShape
from rl_system.studies.scaling.hardware import SHIPPED, read_figures

TOY = Path("toy/weights")


@pytest.mark.unit
def test_the_published_policy_has_its_published_number_of_parameters():
    shape = models.published_policy()
    assert shape.parameters == 7_080_775_680  # counted on the meta device, domain facts 2.1
    assert shape.key_value_bytes(2) == 524_288
    assert shape.image_ids == (276, 1_060, 4_164)  # docs/sequence.md
    assert shape.max_position_embeddings == 11_776


@pytest.mark.unit
def test_a_shape_counts_what_the_file_holds():
    shape = models.read_policy(TOY / "policy")
    assert shape.parameters == models.values_in(TOY / "policy") == 2_167_488  # the card
    assert shape.image_ids == (10, 24, 76)


@pytest.mark.unit
def test_the_toys_other_models_are_read_from_their_folders():
    vlm = models.read_vlm(TOY / "qwen_vl")
    assert vlm.key_values == 2 * 5 * 2 * 32
    detector = models.read_detector(TOY / "grounding_dino", TOY / "sam")
    assert (detector.attention, detector.pixels) == (4 * 64**2, 64 * 64)
    assert models.read_tokenizer(TOY / "vq").channels == 32


@pytest.mark.unit
def test_the_published_config_of_the_expert_is_read_too(tmp_path):
    """Its published config.json is flat: the language model's fields stand beside ``vision_config``."""
    flat = {"hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2_5_vl", "vision_config": {}} | flat))
    shutil.copy(TOY / "vq/model.safetensors", tmp_path)
    assert models.read_vlm(tmp_path).key_values == models.PUBLISHED_VLM.key_values
    assert models.PUBLISHED_VLM.key_value_bytes(2) == 57_344


@pytest.mark.unit
def test_an_instruction_without_a_tokenizer_is_not_underestimated(tmp_path):
    shape, text = models.read_policy(TOY / "policy"), "Restore step by step: <|image|>"
    counted = models.prompt_ids(shape, text, TOY / "policy")
    assert 78 < counted <= models.prompt_ids(shape, text, tmp_path)


@pytest.mark.unit
def test_a_config_that_is_no_policys_is_refused():
    with pytest.raises(ValueError, match=r"config\.json is no VLCoT policy's: .*hidden_size"):
        PolicyShape.of_config({"vocab_size": 5})


@pytest.mark.unit
def test_the_simulator_counts_with_the_same_sizes():
    """The figures of the costs file stand there with their sources; they may not drift from the plan's."""
    _, figures = read_figures(SHIPPED)
    shape, policy = models.published_policy(), figures["policy"]
    assert policy["parameters"] == pytest.approx(shape.parameters, rel=1e-3)
    assert policy["layer_parameters"] == pytest.approx(shape.num_hidden_layers * shape.layer, rel=1e-3)
    assert (policy["layers"], policy["hidden"]) == (shape.num_hidden_layers, shape.hidden_size)
    assert policy["kv_bytes_per_token"] == shape.key_value_bytes(2)
    assert figures["learner"]["bytes_per_parameter"] == sum(states(1, 1, 2, reference=True).values())
    expert = figures["expert"]
    assert expert["parameters"] + expert["vision_parameters"] == pytest.approx(
        models.PUBLISHED_VLM.parameters, rel=5e-3
    )
    assert expert["kv_bytes_per_token"] == models.PUBLISHED_VLM.key_value_bytes(2)


@pytest.mark.engine
def test_the_other_published_models_have_their_size_on_the_meta_device():
    import torch
    from transformers import (
        GroundingDinoConfig,
        GroundingDinoForObjectDetection,
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        SamConfig,
        SamModel,
    )

    text = {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28}
    text |= {"num_key_value_heads": 4, "vocab_size": 152064}
    vision = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 3584}
    sam = {"hidden_size": 1280, "num_hidden_layers": 32, "num_attention_heads": 16, "mlp_dim": 5120}
    sam |= {"global_attn_indexes": [7, 15, 23, 31]}
    with torch.device("meta"):
        expert = Qwen2_5_VLForConditionalGeneration(
            Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False)
        )
        segmenter = SamModel(SamConfig(vision_config=sam))
        detector = GroundingDinoForObjectDetection(GroundingDinoConfig())  # its defaults are tiny's
    counts = [sum(p.numel() for p in model.parameters()) for model in (expert, segmenter, detector)]
    assert counts[0] == models.PUBLISHED_VLM.parameters
    assert counts[1] + counts[2] == models.PUBLISHED_DETECTOR.parameters
