"""Image tokenizer around JanusVQVAE: shapes, batch invariance, float32 search on unit vectors, clear errors."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import JanusVQVAEConfig
from transformers.models.janus.modeling_janus import JanusVQVAE

from vlcot.tokenizer.image import ImageTokenizer, nearest_codes, to_pixels, to_signal

pytestmark = pytest.mark.unit


def random_model() -> JanusVQVAE:
    torch.manual_seed(0)
    config = JanusVQVAEConfig(
        base_channels=32,
        channel_multiplier=[1, 1, 1, 1],
        num_res_blocks=1,
        latent_channels=32,
        embed_dim=8,
        num_embeddings=64,
        num_patches=8,
    )
    model = JanusVQVAE(config)
    # Rows of unequal length: a search that does not normalise them picks other codes.
    model.quantize.embedding.weight.data = torch.randn(64, 8) * torch.linspace(0.1, 3.0, 64)[:, None]
    return model


@pytest.fixture(scope="module")
def tokenizer() -> ImageTokenizer:
    return ImageTokenizer(random_model())


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (3, 32, 48, 3), dtype=np.uint8)


def test_roundtrip_shapes_and_dtypes_for_any_multiple_of_the_downsample(tokenizer):
    assert tokenizer.downsample == 8 and tokenizer.codebook_size == 64
    for height, width in ((8, 8), (16, 16), (64, 64), (32, 48)):
        codes = tokenizer.encode(np.zeros((2, height, width, 3), np.uint8))
        assert codes.shape == (2, height // 8, width // 8) and codes.dtype == torch.int64
        decoded = tokenizer.decode(codes)
        assert decoded.shape == (2, height, width, 3) and decoded.dtype == torch.uint8


def test_codes_and_pixels_do_not_depend_on_the_batch(tokenizer, images):
    codes = tokenizer.encode(images)
    alone = torch.cat([tokenizer.encode(images[i : i + 1]) for i in range(len(images))])
    assert torch.equal(codes, alone)
    together = tokenizer.decode(codes).int()
    single = torch.cat([tokenizer.decode(codes[i : i + 1]) for i in range(len(images))]).int()
    assert (together - single).abs().max() <= 1  # convolution kernels may round differently per batch size


def test_search_is_the_float64_nearest_neighbour_of_unit_vectors(tokenizer, images):
    latents = tokenizer.model.quant_conv(tokenizer.model.encoder(to_signal(torch.from_numpy(images)))).double()
    rows = F.normalize(tokenizer.model.quantize.embedding.weight.double(), dim=-1)
    flat = F.normalize(latents.permute(0, 2, 3, 1).reshape(-1, 8), dim=-1)
    expected = torch.cdist(flat, rows).argmin(-1)
    assert torch.equal(tokenizer.encode(images).flatten(), expected)
    raw = torch.cdist(latents.permute(0, 2, 3, 1).reshape(-1, 8), tokenizer.model.quantize.embedding.weight.double())
    assert (raw.argmin(-1) != expected).any()  # the normalisation is what makes the difference


def test_search_stays_in_float32_for_bfloat16_latents():
    torch.manual_seed(1)
    rows = F.normalize(torch.randn(512, 8), dim=-1)
    latents = torch.randn(1, 8, 16, 16).bfloat16()
    expected = nearest_codes(latents.float(), rows)
    assert torch.equal(nearest_codes(latents, rows), expected)
    flat = F.normalize(latents.permute(0, 2, 3, 1), dim=-1)
    assert ((flat @ rows.T.bfloat16()).argmax(-1) != expected).any()


def test_pixels_map_to_minus_one_to_one_and_back_exactly():
    pixels = torch.arange(256, dtype=torch.uint8).repeat(3, 1).T.reshape(1, 16, 16, 3)
    signal = to_signal(pixels)
    assert signal.min() == -1 and signal.max() == 1
    assert torch.equal(to_pixels(signal), pixels)
    out_of_range = torch.tensor([-9.0, 9.0, 0.5 / 127.5]).reshape(1, 3, 1, 1)
    assert to_pixels(out_of_range).flatten().tolist() == [0, 255, 128]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (np.zeros((1, 16, 16, 3), np.float32), "must be uint8 .* got torch.float32"),
        (np.zeros((16, 16, 3), np.uint8), r"\[B, H, W, 3\], got torch.uint8 \[16, 16, 3\]"),
        (np.zeros((1, 3, 16, 16), np.uint8), r"\[B, H, W, 3\]"),
        (np.zeros((1, 16, 20, 3), np.uint8), "multiples of 8, got 16x20"),
        (np.zeros((1, 0, 16, 3), np.uint8), "multiples of 8, got 0x16"),
    ],
)
def test_bad_images_are_refused(tokenizer, bad, message):
    with pytest.raises(ValueError, match=message):
        tokenizer.encode(bad)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (np.full((1, 2, 2), 64), r"\[0, 64\), got 64 to 64"),
        (np.full((1, 2, 2), -1), r"got -1 to -1"),
        (np.zeros((1, 4), np.int64), r"int64 \[B, h, w\]"),
        (np.zeros((1, 2, 2), np.float32), "got torch.float32"),
    ],
)
def test_bad_codes_are_refused(tokenizer, bad, message):
    with pytest.raises(ValueError, match=message):
        tokenizer.decode(bad)


def test_saved_half_precision_weights_load_as_float32(tmp_path):
    random_model().half().save_pretrained(tmp_path)
    loaded = ImageTokenizer.from_pretrained(tmp_path)
    assert loaded.codebook.dtype == torch.float32
    assert torch.allclose(loaded.codebook.norm(dim=-1), torch.ones(64))


def test_norm_groups_of_the_config_survive_saving_and_loading(tmp_path):
    model = random_model()
    model.config.norm_groups = 4
    model.save_pretrained(tmp_path)
    for loaded, expected in ((ImageTokenizer.from_pretrained(tmp_path), 4), (ImageTokenizer(random_model()), 32)):
        norms = [m for m in loaded.model.modules() if isinstance(m, torch.nn.GroupNorm)]
        assert norms and {norm.num_groups for norm in norms} == {expected}


def test_a_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json is missing"):
        ImageTokenizer.from_pretrained(tmp_path / "nowhere")
