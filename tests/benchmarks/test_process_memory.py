"""Peaks of processes that are started here."""

from __future__ import annotations

import subprocess
import sys

import pytest

from benchmarks.chaos.processes import Row
from benchmarks.process_memory import OTHERS, Peak, _kind, watch

MIB = 2**20
HOLD = "import time; block = bytearray({size}); time.sleep(1.2); del block; time.sleep(0.3)"


@pytest.mark.engine
def test_the_peak_of_a_process_and_of_its_child_is_seen():
    child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {HOLD.format(size=96 * MIB)!r}])"
    peaks = watch(subprocess.Popen([sys.executable, "-c", child]))
    assert [peak.kind for peak in peaks] == ["driver", OTHERS]
    driver, others = peaks
    assert driver.resident < 64 * MIB
    assert 96 * MIB < others.private <= others.resident < 160 * MIB


@pytest.mark.unit
def test_a_process_of_vllm_belongs_to_the_actor_or_server_that_started_it():
    peaks = {1: Peak("driver"), 2: Peak("rollout actor"), 3: Peak("expert replica")}

    def kind(title: str, parent: int) -> str:
        return _kind(Row(9, parent, title, 0.0), peaks)

    assert kind("ray::RolloutActor.generate", 1) == "rollout actor"
    assert kind("ray::ServeReplica:qwen_vl:qwen_vl.handle", 1) == "expert replica"
    assert kind("VLLM::EngineCore", 2) == "rollout engine"
    assert kind("VLLM::EngineCore", 3) == "expert engine"
    assert kind("ray::IDLE", 1) == kind("VLLM::EngineCore", 1) == OTHERS
