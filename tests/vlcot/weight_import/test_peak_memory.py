"""Memory stays near one shard while a checkpoint is converted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.vlcot.weight_import import published
from vlcot.weight_import import convert
from vlcot.weight_import.source import Checkpoint

pytestmark = pytest.mark.engine
MIB = 1024**2


def peak_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


@pytest.mark.parametrize("torch_files", [False, True], ids=["safetensors", "torch"])
def test_peak_memory_is_near_one_shard(tmp_path, torch_files):
    (tmp_path / "source").mkdir()
    values = {f"t{n}": torch.randn(MIB) for n in range(64)}  # 256 MiB in tensors of 4 MiB
    published.write_shards(tmp_path / "source", values, shards=8, torch_files=torch_files)
    table = {name: convert.Conversion(name, ((MIB,),), (MIB,)) for name in values}
    plan = convert.Plan(table, lambda _: False, {"architectures": ["Test"]}, ())
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew; `values` stay alive
    start = peak_bytes()
    convert.write(Checkpoint.open(tmp_path / "source"), plan, tmp_path / "ours", lambda _: None, limit=32 * MIB)
    assert peak_bytes() - start < 128 * MIB
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) == 8
    assert torch.equal(dict(Checkpoint.open(tmp_path / "ours").values(["t63"]))["t63"], values["t63"])
