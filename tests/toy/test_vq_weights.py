"""The shipped VQ weights mean something on held-out crops."""

from pathlib import Path

import numpy as np
import pytest

from toy.photographs import crop
from toy.train_vq import psnr
from vlcot.tokenizer.image import ImageTokenizer

pytestmark = pytest.mark.engine
FOLDER = Path(__file__).parents[2] / "toy/weights/vq"


@pytest.fixture(scope="module")
def tokenizer() -> ImageTokenizer:
    return ImageTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    """Four held-out crops of each of the 16 photographs."""
    return np.stack([crop(index, "heldout").image for index in range(64)])


def test_heldout_reconstruction_is_at_least_20_db(tokenizer, images):
    codes = tokenizer.encode(images)
    assert codes.shape == (64, 8, 8)
    assert psnr(tokenizer.decode(codes).numpy(), images).mean() >= 23  # 20 is required; the card says 23.85
    assert len(codes.unique()) > 0.25 * tokenizer.codebook_size


def test_other_codes_give_another_picture(tokenizer, images):
    """The decoder reads its codes: the codes of another crop reconstruct this one far worse."""
    codes = tokenizer.encode(images)
    assert psnr(tokenizer.decode(codes.roll(1, 0)).numpy(), images).mean() < 15


def test_the_weights_are_small():
    assert (FOLDER / "model.safetensors").stat().st_size <= 2.5e6
