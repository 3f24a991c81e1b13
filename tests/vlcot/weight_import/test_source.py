"""The reader: safetensors headers that lie, and memory that stays near one shard."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from tests.vlcot.weight_import import published
from vlcot.weight_import.source import Checkpoint, ImportRefused

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"dtype": "F32", "shape": [4], "data_offsets": [0, 8]}, "cannot take 8 bytes"),
        ({"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}, "of shape"),
        ({"dtype": "F32", "shape": [-1, -2], "data_offsets": [0, 8]}, "of shape"),
        ({"dtype": "F8_E4M3", "shape": [8], "data_offsets": [0, 8]}, "has dtype F8_E4M3"),
        ({"dtype": "F32", "shape": [2]}, "is broken"),
        ("nothing", "is broken"),
        ({"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}, "is truncated"),
        ({"dtype": "F32", "shape": [1e400], "data_offsets": [0, 8]}, "is broken"),
        ({"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "take 4 bytes, but it holds 8"),
    ],
)
def test_a_header_that_lies_is_refused_by_name(tmp_path, entry, said):
    text = json.dumps({"wrong": entry}).encode()
    file = tmp_path / "model.safetensors"
    file.write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    with pytest.raises(ImportRefused, match=said) as refusal:
        Checkpoint.open(tmp_path)
    assert "wrong" in str(refusal.value) or "holds" in said


def test_a_tensor_in_two_shards_is_refused_by_name(tmp_path):
    published.write_shards(tmp_path, {"a": torch.ones(2), "b": torch.ones(2)}, shards=2)
    second = tmp_path / "model-00002-of-00002.safetensors"
    second.write_bytes((tmp_path / "model-00001-of-00002.safetensors").read_bytes())
    with pytest.raises(ImportRefused, match="tensor 'a' is already in model-00001-of-00002"):
        Checkpoint.open(tmp_path)


def test_bytes_changed_anywhere_are_read_or_refused_but_never_crash(tmp_path):
    published.write_shards(tmp_path, {"a": torch.ones(64), "b": torch.ones(3, 5)}, shards=1)
    torch.save({"model": {"a": torch.ones(64), "b": torch.ones(3, 5)}}, tmp_path / "vq.pt")
    generator = np.random.default_rng(0)
    for file in (tmp_path / "model-00001-of-00001.safetensors", tmp_path / "vq.pt"):
        sound, refused = file.read_bytes(), 0
        for _ in range(150):
            broken = bytearray(sound)
            for position in generator.integers(0, min(len(sound), 700), 3):
                broken[position] = generator.integers(256)
            file.write_bytes(broken)
            try:
                checkpoint = Checkpoint.open(file)
                list(checkpoint.values(list(checkpoint.tensors)))
            except ImportRefused:
                refused += 1
        assert refused > 50
