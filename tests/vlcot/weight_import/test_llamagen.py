"""A small LlamaGen VQ, imported, encodes and decodes as LlamaGen's layout does.

The reference below walks the source's own tensors by the rules of domain.md 3.1, in plain torch.
"""

from __future__ import annotations

import argparse

import pytest
import torch
from torch.nn import functional as F

from tests.vlcot.weight_import import published
from vlcot.tokenizer.image import ImageTokenizer, to_pixels, to_signal
from vlcot.weight_import import convert
from vlcot.weight_import.llamagen import vq_plan
from vlcot.weight_import.source import Checkpoint, ImportRefused

pytestmark = pytest.mark.unit
CONFIG = published.SMALL_VQ
LEVELS = len(CONFIG.channel_multiplier)


class LlamaGen:
    """Functional encoder and decoder over a LlamaGen state dict."""

    def __init__(self, state: dict[str, torch.Tensor]) -> None:
        self.state = state

    def conv(self, x, name, stride=1):
        weight = self.state[f"{name}.weight"]
        padding = weight.shape[-1] // 2 if stride == 1 else 0
        return F.conv2d(x, weight, self.state[f"{name}.bias"], stride, padding)

    def norm(self, x, name):
        return F.group_norm(x, 32, self.state[f"{name}.weight"], self.state[f"{name}.bias"], eps=1e-6)

    def res(self, x, name):
        h = self.conv(F.silu(self.norm(x, f"{name}.norm1")), f"{name}.conv1")
        h = self.conv(F.silu(self.norm(h, f"{name}.norm2")), f"{name}.conv2")
        return h + (self.conv(x, f"{name}.nin_shortcut") if f"{name}.nin_shortcut.weight" in self.state else x)

    def attn(self, x, name):
        h = self.norm(x, f"{name}.norm")
        q, k, v = (self.conv(h, f"{name}.{part}").flatten(2).transpose(1, 2) for part in "qkv")
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
        return x + self.conv(mixed, f"{name}.proj_out")

    def blocks(self, x, prefix, count):
        for j in range(count):
            x = self.res(x, f"{prefix}.res.{j}")
            if f"{prefix}.attn.{j}.q.weight" in self.state:
                x = self.attn(x, f"{prefix}.attn.{j}")
        return x

    def middle(self, x, side):
        return self.res(self.attn(self.res(x, f"{side}.mid.0"), f"{side}.mid.1"), f"{side}.mid.2")

    def end(self, x, side):
        return self.conv(F.silu(self.norm(x, f"{side}.norm_out")), f"{side}.conv_out")

    def encode(self, pixels):
        x = self.conv(pixels, "encoder.conv_in")
        for i in range(LEVELS):
            x = self.blocks(x, f"encoder.conv_blocks.{i}", CONFIG.num_res_blocks)
            if i < LEVELS - 1:
                down = f"encoder.conv_blocks.{i}.downsample.conv"
                x = self.conv(F.pad(x, (0, 1, 0, 1)), down, stride=2)
        z = self.conv(self.end(self.middle(x, "encoder"), "encoder"), "quant_conv")
        unit = F.normalize(z.double().permute(0, 2, 3, 1), dim=-1)
        return torch.cdist(unit, self.codebook().expand(len(unit), 1, -1, -1)).argmin(-1)

    def decode(self, codes):
        x = self.conv(self.codebook()[codes].permute(0, 3, 1, 2).float(), "post_quant_conv")
        x = self.middle(self.conv(x, "decoder.conv_in"), "decoder")
        for k in range(LEVELS):
            x = self.blocks(x, f"decoder.conv_blocks.{k}", CONFIG.num_res_blocks + 1)
            if k < LEVELS - 1:
                x = F.interpolate(x, scale_factor=2.0, mode="nearest")
                x = self.conv(x, f"decoder.conv_blocks.{k}.upsample.conv")
        return self.end(x, "decoder")

    def codebook(self):
        return F.normalize(self.state["quantize.embedding.weight"].double(), dim=-1)


@pytest.fixture(scope="module")
def state():
    state = published.llamagen_state(CONFIG)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(CONFIG.codebook, CONFIG.embed_dim, generator=generator)
    state["quantize.embedding.weight"] = rows * torch.linspace(0.1, 3.0, CONFIG.codebook)[:, None]
    for name, tensor in state.items():
        if "norm" in name:
            tensor += 0.3 * torch.randn(tensor.shape, generator=generator)
    return state


def imported(file, output):
    checkpoint, plan = Checkpoint.open(file), vq_plan(CONFIG)
    convert.write(checkpoint, plan, output, report=lambda _: None)
    convert.check(checkpoint, plan, output)
    return ImageTokenizer.from_pretrained(output)


def test_codes_and_images_are_those_of_the_source_layout(tmp_path, state):
    torch.save({"model": state, "args": argparse.Namespace(lr=1e-4), "steps": 7}, tmp_path / "vq_ds8_c2i.pt")
    tokenizer = imported(tmp_path / "vq_ds8_c2i.pt", tmp_path / "ours")
    images = torch.randint(0, 256, (2, 32, 48, 3), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)
    reference = LlamaGen(state)

    with torch.no_grad():
        codes = reference.encode(to_signal(images))
        assert torch.equal(tokenizer.encode(images), codes) and codes.shape == (2, 4, 6)
        assert len(codes.unique()) > 8
        signal = reference.decode(codes)
        ours = tokenizer.model.decoder(tokenizer.model.post_quant_conv(tokenizer.codebook[codes].permute(0, 3, 1, 2)))
    torch.testing.assert_close(ours, signal, rtol=1e-4, atol=1e-4)
    assert (tokenizer.decode(codes).int() - to_pixels(signal).int()).abs().max() <= 1


def test_the_codebook_is_stored_in_float32_with_rows_of_length_one(tmp_path, state):
    half = {name: tensor.half() for name, tensor in state.items()}
    torch.save(half, tmp_path / "vq.pt")
    weight = imported(tmp_path / "vq.pt", tmp_path / "ours").model.quantize.embedding.weight
    assert weight.dtype is torch.float32
    torch.testing.assert_close(weight.norm(dim=-1), torch.ones(CONFIG.codebook), rtol=0, atol=1e-6)


def test_ema_is_preferred_to_model(tmp_path, state):
    torch.save({"model": {"x": torch.zeros(1)}, "ema": state}, tmp_path / "vq.pt")
    convert.verify(Checkpoint.open(tmp_path / "vq.pt"), vq_plan(CONFIG))


def test_a_codebook_row_without_direction_is_refused(tmp_path, state):
    rows = state["quantize.embedding.weight"].clone()
    rows[5] = 0
    torch.save(state | {"quantize.embedding.weight": rows}, tmp_path / "vq.pt")
    with pytest.raises(ImportRefused, match=r"'quantize\.embedding\.weight': row 5 is all zeros"):
        convert.check(Checkpoint.open(tmp_path / "vq.pt"), vq_plan(CONFIG), None)
