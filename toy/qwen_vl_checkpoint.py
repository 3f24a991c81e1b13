"""The toy visual expert's architecture and files: a Qwen2.5-VL of about a million parameters for 64x64 images.

An image is 64 patches of 8x8 pixels, merged to 16 tokens. The tokenizer holds each fixed part of the JSON answer as
one token and each score from 0 to 10 as one token, so an answer takes 6 tokens per image.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from scipy.fft import dct
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

from reward_servers.expert_chat import SCORE_NAMES, ExpertPrompt, write_answer

WEIGHTS = Path(__file__).parent / "weights" / "qwen_vl"
IMAGE_SIZE = 64
TOKENS_PER_IMAGE = 16

TOY_PROMPT = ExpertPrompt(rubric="Score {count} images against the first.", reference_label="", image_label="")
"""The question the toy expert was trained on; it understands no other. Saying the count in it lets the small model find
each entry's image: with the count known, entry and image are a fixed distance apart."""

_SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
_CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Qwen2.5-VL's layout of a turn, for content given as a list of parts."""


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE, split between digits and everything else, trained on the chat and its answers."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\d+"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    corpus = [write_answer([dict.fromkeys(SCORE_NAMES, score)] * 2) for score in range(11)]
    corpus += ["user\n", "assistant\n", "\n", TOY_PROMPT.rubric.replace("{count}", "8")]
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=list(_SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus * 2, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")


def build_processor() -> Qwen2_5_VLProcessor:
    """Tokenizer, chat template and an image processor that brings every image to 64x64."""
    pixels = IMAGE_SIZE * IMAGE_SIZE
    images = Qwen2VLImageProcessor(
        patch_size=8,
        merge_size=2,
        temporal_patch_size=2,
        size={"shortest_edge": pixels, "longest_edge": pixels},
        # Pixels become 2 to 6: the mean of a patch is never zero, so RMSNorm keeps how strong its texture is.
        image_mean=[-0.5] * 3,
        image_std=[0.25] * 3,
    )
    videos = Qwen2VLVideoProcessor(patch_size=8, merge_size=2, temporal_patch_size=2)
    tokenizer = build_tokenizer()
    return Qwen2_5_VLProcessor(
        image_processor=images, tokenizer=tokenizer, video_processor=videos, chat_template=_CHAT_TEMPLATE
    )


def build_model(processor: Qwen2_5_VLProcessor, seed: int) -> Qwen2_5_VLForConditionalGeneration:
    """Untrained model in fp32."""
    token_id = processor.tokenizer.convert_tokens_to_ids
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(processor.tokenizer),
            "hidden_size": 128,
            "intermediate_size": 192,
            "num_hidden_layers": 5,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 1024,
            "rope_parameters": {"rope_type": "default", "mrope_section": [6, 5, 5], "rope_theta": 10_000.0},
            "bos_token_id": None,
            "eos_token_id": token_id("<|im_end|>"),
            "pad_token_id": token_id("<|endoftext|>"),
        },
        vision_config={
            "depth": 2,
            "hidden_size": 96,
            "intermediate_size": 192,
            "num_heads": 3,
            "out_hidden_size": 128,
            "window_size": IMAGE_SIZE,
            "fullatt_block_indexes": [0, 1],
            "patch_size": 8,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
        image_token_id=token_id("<|image_pad|>"),
        video_token_id=token_id("<|video_pad|>"),
        vision_start_token_id=token_id("<|vision_start|>"),
        vision_end_token_id=token_id("<|vision_end|>"),
        tie_word_embeddings=True,
    )
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration(config)
    # transformers draws all weights with sigma 0.02, for widths of thousands; here that would silence every block.
    for name, weight in model.named_parameters():
        if weight.ndim >= 2 and "embed_tokens" not in name:
            torch.nn.init.normal_(weight, std=weight[0].numel() ** -0.5)
    for layer in model.model.language_model.layers:
        # Queries equal to keys: attention starts as a search for like content, as of an image in the reference.
        attention = layer.self_attn
        with torch.no_grad():
            keys = attention.k_proj.weight.unflatten(0, (-1, attention.head_dim))
            attention.q_proj.weight.copy_(keys.repeat_interleave(attention.num_key_value_groups, dim=0).flatten(0, 1))
    # A patch is seen in two equal frames (temporal_patch_size), each gives half.
    frames = torch.from_numpy(0.5 * frequency_filters()).float()[:, :, None].expand(-1, -1, 2, -1, -1)
    with torch.no_grad():
        model.model.visual.patch_embed.proj.weight.copy_(frames)
    return model


def frequency_filters() -> np.ndarray:
    """float64 [96, 3, 8, 8]: the 8x8 cosine transform of luma and the 16 lowest frequencies of both colour differences.

    The start of the patch embedding. Each filter is scaled by its frequency: a photograph's spectrum falls about so,
    which gives all outputs the same spread (1.3 and 0.5: measured on the toy photographs).
    """
    cosines = dct(np.eye(8), axis=0, norm="ortho")
    frequency = np.hypot(*np.mgrid[:8, :8])
    frequency[0, 0] = 0.25
    waves = np.einsum("ui,vj->uvij", cosines, cosines) * frequency[..., None, None]
    luma = np.array([0.299, 0.587, 0.114])
    low = waves[:4, :4].reshape(-1, 1, 8, 8) / 0.5
    blue, red = (
        colour[:, None, None] * low for colour in (np.array([0.0, 0.0, 1.0]) - luma, np.array([1.0, 0.0, 0.0]) - luma)
    )
    return np.concatenate([luma[:, None, None] * waves.reshape(-1, 1, 8, 8) / 1.3, blue, red])


def save_checkpoint(model: Qwen2_5_VLForConditionalGeneration, processor: Qwen2_5_VLProcessor, folder: Path) -> None:
    """Write weights in fp16 (the model in memory stays fp32), processor, tokenizer and the expert's prompt."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.to(torch.float16) for name, tensor in model.state_dict().items()}
    config_dtype, model.config.dtype = model.config.dtype, torch.float16
    model.save_pretrained(folder, state_dict=state)
    model.config.dtype = config_dtype
    processor.save_pretrained(folder)
    TOY_PROMPT.save(folder)
