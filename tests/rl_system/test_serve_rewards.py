"""``rl-system serve-rewards`` for real: a Ray of its own, HTTP, scores, scaling and settings while it serves."""

from __future__ import annotations

import asyncio
import io
import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from reward_servers.client import RewardClient
from reward_servers.grounded_sam import GroundedSam
from reward_servers.http_guard import TOKEN_VARIABLE
from reward_servers.http_transport import HttpTransport
from reward_servers.iqa import Iqa
from rl_system import assembly
from rl_system.config.compose import CONFIG_DIR, load_config
from rl_system.data.prepared import PreparedData
from rl_system.serve_config import ServeCluster
from tests.processes import free_ports
from tests.rl_system.data.test_prepare_data import overrides, prepare
from toy.detection_examples import scene_examples
from toy.export_photographs import export
from vlcot.groups import Failed

pytestmark = [pytest.mark.engine, pytest.mark.timeout(400)]

TOKEN = "a-token-of-the-tests-0123456789"
OVERRIDES = ["experiment=toy", "reward=perceptual_offline"]
COMMAND = [sys.executable, "-m", "rl_system", "serve-rewards"]


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=120, cwd=CONFIG_DIR.parent)


@pytest.fixture(scope="module")
def servers():
    """Address over HTTP and of the dashboard, and the process."""
    port, dashboard = free_ports(2)
    environment = os.environ | {TOKEN_VARIABLE: TOKEN, "RAY_AUTH_MODE": "disabled"}
    ports = ["--port", str(port), "--dashboard-port", str(dashboard), "--num-cpus", "6"]
    process = subprocess.Popen(
        [*COMMAND, "start", *OVERRIDES, *ports],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        cwd=CONFIG_DIR.parent,
        start_new_session=True,
    )
    said = []
    try:
        for line in process.stdout:
            said.append(line)
            if "reward.url=" in line:
                break
        else:
            pytest.fail("the servers did not start:\n" + "".join(said))
        assert f"reward.url=http://127.0.0.1:{port}" in said[-1] and TOKEN not in "".join(said)
        yield f"http://127.0.0.1:{port}", f"http://127.0.0.1:{dashboard}", process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            process.wait(timeout=60)


@pytest.fixture(scope="module")
def images():
    return [example.image for example in scene_examples(4, "heldout")]


@pytest.fixture(scope="module")
def config():
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(CONFIG_DIR.parent)
        return load_config(OVERRIDES)


def ask(url, question, token=TOKEN):
    async def one():
        client = RewardClient(HttpTransport(url, token), timeout_s=60)
        try:
            return await question(client)
        finally:
            await client.close()

    return asyncio.run(one())


def detected(url, image):
    return ask(url, lambda client: client.objects(image))


def pids(dashboard, app="grounded_sam"):
    return {r["pid"] for r in ServeCluster(dashboard).status()[app]["replicas"] if r["state"] == "RUNNING"}


def until(condition, seconds=90):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.5)


def test_scores_over_http_equal_a_direct_call_exactly(servers, images, config):
    url, _, _ = servers
    direct = GroundedSam(assembly.detector_config(config))
    assert [detected(url, image) for image in images] == [direct.detect([image])[0] for image in images]
    requests = [images[0], images[1]]
    measured = ask(url, lambda client: client.measure(requests, images[2]))
    assert measured == Iqa(assembly.iqa_config(config)).measure([(requests, images[2])])[0]


def test_prepare_data_has_its_objects_from_a_live_server(servers, tmp_path, monkeypatch):
    """Over HTTP, of the target and not of the photograph."""
    url, _, _ = servers
    monkeypatch.setenv(TOKEN_VARIABLE, TOKEN)
    export(tmp_path / "toy", 8, seed=0)
    prepare(overrides(tmp_path / "toy", tmp_path / "data", objects="grounded_sam", url=url))
    data = PreparedData(tmp_path / "data")
    rows = [data.row(index) for index in range(len(data))]
    targets = [np.asarray(Image.open(io.BytesIO(row["target"]))) for row in rows]
    assert [tuple(row["objects"]) for row in rows] == [detected(url, target).main for target in targets]
    assert len(rows) == 8 and any(row["objects"] for row in rows)


def test_nobody_gets_in_without_the_token_and_bad_images_are_refused(servers, images):
    url, _, _ = servers
    answer = ask(url, lambda client: client.objects(images[0]), token="wrong-token-of-the-tests")
    assert isinstance(answer, Failed) and "401" in answer.reason and "refused" in answer.reason
    answer = ask(url, lambda client: client.measure([images[0], images[1][:8]], images[0]))
    assert isinstance(answer, Failed) and "one size" in answer.reason


def test_idle_connections_do_not_keep_others_out(servers, images):
    """Connections that send nothing, as many as this process may open and at most 10,000."""
    import resource

    url, _, _ = servers
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 12_000), hard))
    port = int(url.rsplit(":", 1)[1])
    idle = []
    try:
        for _ in range(10_000):
            idle.append(socket.create_connection(("127.0.0.1", port), timeout=60))
        assert not isinstance(detected(url, images[0]), Failed)
    finally:
        for connection in idle:
            connection.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert not isinstance(detected(url, images[0]), Failed)


def test_a_live_setting_changes_answers_without_a_restart(servers, images):
    url, dashboard, _ = servers
    before, answer = pids(dashboard), detected(url, images[0])
    assert answer.objects
    changed = command("set", "grounded_sam", "box_threshold=0.99", "--address", dashboard)
    assert changed.returncode == 0, changed.stderr
    until(lambda: getattr(detected(url, images[0]), "objects", None) == ())
    assert command("set", "grounded_sam", "box_threshold=0.25", "--address", dashboard).returncode == 0
    until(lambda: detected(url, images[0]) == answer)
    until(lambda: pids(dashboard) == before)  # those that are just being updated are not in it


def test_a_bad_change_is_refused_and_changes_nothing(servers, images):
    url, dashboard, _ = servers
    before, answer = pids(dashboard), detected(url, images[0])
    for arguments, said in (
        (("set", "grounded_sam", "box_threshold=7"), "box_threshold must lie in [0, 1]"),
        (("set", "grounded_sam", "detector=x"), "no live setting"),
        (("scale", "grounded_sam", "0"), "1 <= LEAST <= MOST"),
        (("scale", "sam", "1"), "there are: grounded_sam, iqa"),
    ):
        refused = command(*arguments, "--address", dashboard)
        assert refused.returncode == 2 and said in refused.stderr, refused.stderr
    assert pids(dashboard) == before and detected(url, images[0]) == answer


def test_one_server_is_scaled_and_the_other_stays_as_it_was(servers):
    _, dashboard, _ = servers
    detector, metrics = pids(dashboard), pids(dashboard, "iqa")
    scaled = command("scale", "grounded_sam", "2", "--address", dashboard)
    assert scaled.returncode == 0, scaled.stderr
    until(lambda: len(pids(dashboard)) == 2)
    assert detector < pids(dashboard) and pids(dashboard, "iqa") == metrics
    shown = command("status", "--address", dashboard)
    assert shown.returncode == 0 and "RUNNING" in shown.stdout and all(str(p) in shown.stdout for p in pids(dashboard))
    assert command("scale", "grounded_sam", "1", "--address", dashboard).returncode == 0
    until(lambda: len(pids(dashboard)) == 1)
    assert pids(dashboard, "iqa") == metrics


def test_an_interrupt_ends_everything(servers):
    url, dashboard, process = servers
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=90) == 0
    with pytest.raises(ConnectionError):
        ServeCluster(dashboard)
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", int(url.rsplit(":", 1)[1])), timeout=2)
    until(lambda: still_running(process.pid) == [], 30)


def still_running(group: int) -> list[str]:
    """Command lines of a process group."""
    found = subprocess.run(["ps", "-o", "args=", "-g", str(group)], capture_output=True, text=True)
    return found.stdout.splitlines()


def test_a_start_without_a_token_is_refused_at_once():
    environment = {k: v for k, v in os.environ.items() if k != TOKEN_VARIABLE}
    start = [*COMMAND, "start", *OVERRIDES]
    refused = subprocess.run(start, capture_output=True, text=True, timeout=60, env=environment, cwd=CONFIG_DIR.parent)
    assert refused.returncode == 2 and TOKEN_VARIABLE in refused.stderr
