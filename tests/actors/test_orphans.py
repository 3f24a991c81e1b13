"""An engine does not outlive the actor that started it."""

from __future__ import annotations

import subprocess
import sys
import time

import psutil
import pytest

from tests.processes import alive

pytestmark = pytest.mark.unit

PARENT = """
import multiprocessing, time
from actors.vllm_plugin import end_with_parent

def engine(watched):
    if watched:
        end_with_parent()
        end_with_parent()
    print("up", flush=True)
    time.sleep(60)

if __name__ == "__main__":
    for watched in (True, False):
        multiprocessing.get_context("spawn").Process(target=engine, args=(watched,)).start()
    time.sleep(60)
"""


def test_an_engine_ends_when_its_actor_was_killed(tmp_path):
    """The other child, which does not watch, shows that it is the watch that ends it."""
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    parent = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    assert [parent.stdout.readline() for _ in range(2)] == ["up\n"] * 2
    children = psutil.Process(parent.pid).children()
    engines = [child for child in children if "spawn_main" in " ".join(child.cmdline())]
    assert len(engines) == 2, children
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 30
    while len(left := [engine for engine in engines if alive(engine)]) == 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    for engine in left:
        engine.kill()
    assert len(left) == 1, [engines, left]
