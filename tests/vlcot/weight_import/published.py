"""Checkpoints as they are published: exact names and shapes, at full size without data and small with values."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import ChameleonConfig, ChameleonForConditionalGeneration, JanusVQVAEConfig
from transformers.models.janus.modeling_janus import JanusVQVAE

from vlcot import vocabulary as v
from vlcot.sequence import Layout
from vlcot.weight_import.llamagen import VqConfig

LAYOUT = Layout(full_size=64, downsample=8, grid_unit_pixels=16)
CODEBOOK, KNOWN = 64, 48  # codes of the small family, and those that its base model already knew
ROWS, GROWN_ROWS = 340, 356  # embedding rows before and after growth
SMALL = ChameleonConfig(
    vocab_size=ROWS,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    vocabulary_map={"<image>": 3},  # without image names transformers masks no image logits (domain.md 0.4)
    vq_config={"base_channels": 32, "channel_multiplier": [1], "num_res_blocks": 1, "latent_channels": 32},
)
SMALL_VQ = VqConfig((1, 2, 2, 4), base_channels=32, num_res_blocks=2, latent_channels=32, codebook=64)


def small_tokenizer(path: Path, known: int = KNOWN, above: int = ROWS) -> Path:
    """Codes below ``known`` at 4.., the others at ``above``..; bytes as text."""
    specials = [v.BOS, v.PAD, v.EOS, v.UNK, *map(v.code_name, range(known)), v.IMAGE_END, v.IMAGE_START]
    specials += [v.TURN_END, v.NEW_LINE, *(v.grid_name(n) for n in (1, 2, 4))]
    table = {name: i for i, name in enumerate([*specials, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    table |= {v.code_name(c): above + c - known for c in range(known, CODEBOOK)}
    return _save(path, table)


def full_tokenizer(path: Path) -> Path:
    """The published ids of PURE (domain.md 2.2, 2.3); the text is bytes at arbitrary ids."""
    table = {v.BOS: 0, v.PAD: 1, v.EOS: 2, v.UNK: 3, v.IMAGE_END: 8196, v.IMAGE_START: 8197}
    table |= {v.TURN_END: 8710, v.NEW_LINE: 8803} | {v.grid_name(n): 8804 + n for n in (4, 8, 16)}
    table |= {v.code_name(c): c + 4 if c < 8192 else c + 57_344 for c in range(16_384)}
    table |= {letter: 20_000 + i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    return _save(path, table)


def _save(path: Path, table: dict[str, int]) -> Path:
    tokenizer = Tokenizer(models.BPE(vocab=table, merges=[], unk_token=v.UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in table if len(name) > 1])
    tokenizer.save(str(path))
    return path


def full_policy_shapes(rows: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of Lumina-mGPT / PURE 7B, from transformers' class on the meta device."""
    with torch.device("meta"):
        model = ChameleonForConditionalGeneration(ChameleonConfig(vocab_size=rows, vocabulary_map={"<image>": 3}))
    shapes = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    return {n: (1, 128) if "_norm." in n and "self_attn" in n else s for n, s in shapes.items()}


def small_policy(
    folder: Path, ranks: int = 1, seed: int = 0
) -> tuple[dict[str, torch.Tensor], ChameleonForConditionalGeneration]:
    """A random small policy in the published layout (q/k-norm [ranks, d]); the model has its rows spread over heads."""
    torch.manual_seed(seed)
    model = ChameleonForConditionalGeneration(SMALL).eval()
    state = model.state_dict()
    for name, tensor in state.items():
        if not name.startswith("model.vqmodel"):
            tensor.normal_(0, 0.3)
        if "self_attn" in name and "_norm." in name:
            heads = tensor.shape[0]
            published = torch.randn(ranks, tensor.shape[1])
            tensor.copy_(torch.stack([published[head * ranks // heads] for head in range(heads)]))
            state[name] = published
    folder.mkdir(parents=True, exist_ok=True)
    config = SMALL.to_dict() | {"model_parallel_size": ranks, "model_type": "chameleon"}
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {name: tensor.clone() for name, tensor in state.items()}
    write_shards(folder, tensors)
    return tensors, model


def write_shards(folder: Path, tensors: dict[str, torch.Tensor], shards: int = 3, torch_files: bool = False) -> None:
    """A Hugging Face checkpoint in several shards, with its index."""
    names = list(tensors)
    stem, suffix = ("pytorch_model", "bin") if torch_files else ("model", "safetensors")
    weight_map = {}
    for number in range(shards):
        part = {name: tensors[name] for name in names[number::shards]}
        file = f"{stem}-{number + 1:05d}-of-{shards:05d}.{suffix}"
        if torch_files:
            torch.save(part, folder / file)
        else:
            save_file(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def sparse_safetensors(path: Path, shapes: dict[str, tuple[int, ...]]) -> Path:
    """A bfloat16 safetensors file of full length that takes no room on the disk."""
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return path


def janus(config: VqConfig, device: str = "cpu") -> JanusVQVAE:
    """transformers' model of that size."""
    torch.manual_seed(0)
    with torch.device(device):
        return JanusVQVAE(
            JanusVQVAEConfig(
                channel_multiplier=list(config.channel_multiplier),
                base_channels=config.base_channels,
                num_res_blocks=config.num_res_blocks,
                latent_channels=config.latent_channels,
                num_embeddings=config.codebook,
            )
        )


def llamagen_state(config: VqConfig, device: str = "cpu") -> dict[str, torch.Tensor]:
    """Random values under LlamaGen's names (domain.md 3.2, read from right to left)."""
    state = {}
    for name, tensor in janus(config, device).state_dict().items():
        name = re.sub(r"^(encoder)\.down|^(decoder)\.up", lambda m: f"{m[1] or m[2]}.conv_blocks", name)
        name = re.sub(r"(conv_blocks\.\d+)\.block\.", r"\1.res.", name)
        name = name.replace("mid.block_1", "mid.0").replace("mid.attn_1", "mid.1").replace("mid.block_2", "mid.2")
        state[name] = tensor
    state["quantize.codebook_used"] = torch.zeros(65_536, device=device)
    return state
