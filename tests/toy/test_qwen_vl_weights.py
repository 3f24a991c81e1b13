"""The shipped visual expert keeps what its card says, on held-out crops (through transformers)."""

from __future__ import annotations

from dataclasses import asdict

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoProcessor, Qwen2_5_VLForConditionalGeneration

from reward_servers.expert_chat import SCORE_NAMES, ExpertPrompt, write_answer
from toy.expert_quality import ExpertFigures, held_out_figures
from toy.qwen_vl_checkpoint import TOKENS_PER_IMAGE, TOY_PROMPT, WEIGHTS


@pytest.mark.unit
def test_files_are_small_and_complete() -> None:
    weights = load_file(WEIGHTS / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}
    assert sum(path.stat().st_size for path in WEIGHTS.iterdir()) <= 2_400_000
    assert (WEIGHTS / "README.md").is_file()
    assert ExpertPrompt.of_checkpoint(WEIGHTS) == TOY_PROMPT


@pytest.mark.unit
def test_each_score_is_one_token_and_an_image_sixteen() -> None:
    processor = AutoProcessor.from_pretrained(WEIGHTS)
    for count in (1, 8):
        answer = write_answer([dict.fromkeys(SCORE_NAMES, 10)] * count)
        assert len(processor.tokenizer(answer).input_ids) == 6 * count + 1
    assert TOKENS_PER_IMAGE == 16


@pytest.fixture(scope="module")
def figures() -> ExpertFigures:
    torch.set_num_threads(1)
    processor = AutoProcessor.from_pretrained(WEIGHTS)
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(WEIGHTS, dtype=torch.float32).eval()
    return held_out_figures(model, processor, groups=32)


@pytest.mark.engine
def test_held_out_scores_follow_psnr(figures: ExpertFigures) -> None:
    assert figures.psnr >= 0.6, asdict(figures)


@pytest.mark.engine
def test_held_out_scores_follow_severity(figures: ExpertFigures) -> None:
    assert figures.severity <= -0.7, asdict(figures)
