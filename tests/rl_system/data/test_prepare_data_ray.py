"""rl-system prepare-data as a command, with Ray Data: the files hang neither on the workers nor on a kill."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ray

from rl_system.commands.main import main
from rl_system.data.prepared import PreparedData
from tests.rl_system.data.test_prepare_data import contents, overrides, prepare
from toy.export_photographs import export

pytestmark = pytest.mark.engine

COUNT = 40


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toy")
    export(folder, COUNT, seed=1)
    return folder


def arguments(photographs: Path, output: Path, workers: int) -> list[str]:
    return overrides(photographs, output, images_per_shard=1, workers=workers)


def test_one_and_four_workers_and_a_killed_run_give_equal_files(photographs: Path, tmp_path: Path) -> None:
    killed = tmp_path / "killed"
    command = [sys.executable, "-m", "rl_system", "prepare-data", *arguments(photographs, killed, workers=1)]
    process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while not list(killed.glob("shards/*.parquet")):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.005)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    kept = {path.name: path.stat().st_mtime_ns for path in killed.glob("shards/*.parquet")}
    assert 1 <= len(kept) < COUNT and not (killed / "manifest.json").exists()

    inline = tmp_path / "inline"
    assert len(prepare(arguments(photographs, inline, workers=1))) == COUNT
    ray.init("local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    try:
        for output, workers in ((killed, 1), (tmp_path / "four", 4)):
            assert main(["prepare-data", *arguments(photographs, output, workers)]) == 0
            assert contents(output) == contents(inline)
    finally:
        ray.shutdown()
    assert {name: (killed / "shards" / name).stat().st_mtime_ns for name in kept} == kept
    assert len(PreparedData(killed)) == COUNT
