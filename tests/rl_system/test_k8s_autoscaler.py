"""The autoscaler that Ray brings, on a rendered manifest: a pool follows its own load and nobody else's."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest

from rl_system.config.compose import CONFIG_DIR

ROOT = CONFIG_DIR.parent


@pytest.mark.engine
@pytest.mark.timeout(600)
@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl renders the overlay")
def test_load_on_a_reward_pool_scales_that_pool_alone_and_back_to_nothing(tmp_path):
    with (tmp_path / "said").open("w+") as said:
        done = subprocess.run(
            [sys.executable, "-m", "tests.rl_system.fake_kubernetes", "k8s/overlays/gpu-8"],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=said,
            text=True,
        )
        said.seek(0)
        assert done.returncode == 0, said.read()[-3000:]
    *loads, lost = (json.loads(line) for line in done.stdout.splitlines() if line.startswith("{"))
    resting = {"learner": 1, "rollout": 2}
    assert [(event["load"], event["pools"]) for event in loads] == [
        ("none", resting),
        ("reward-sam", resting | {"reward-sam": 2}),
        ("none", resting),
        ("reward-vlm", resting | {"reward-vlm": 2}),
        ("none", resting),
    ]
    assert "rl.io/pool" in lost["infeasible"] and "nowhere" in lost["infeasible"] and lost["pools"] == resting
