"""The demo without browser and engine: what its server answers and refuses, and what is told of a chain."""

from __future__ import annotations

import asyncio
import io
import json
import threading
import time

import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient

from actors.samples import RawSample, build_samples
from benchmarks.random_family import write_image_tokenizer
from rl_system.commands.main import main
from rl_system.runs.pictures import write_png
from rl_system.studies.demo import restoring
from rl_system.studies.demo.app import MOST_BYTES, MOST_OPEN, demo_app
from rl_system.studies.restore.images import ImageRefused, Photograph
from rl_system.studies.restore.pictures import Drawing
from rl_system.studies.restore.policy import Checkpoint
from tests.families import CODEBOOK, INSTRUCTION, random_policy
from vlcot.groups import Group, VersionSpan

pytestmark = pytest.mark.unit
CALL = "/api/restorations"
BINARY = {"content-type": "application/octet-stream"}


def png(width: int = 6, height: int = 4, mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, (width, height), 90).save(buffer, "PNG")
    return buffer.getvalue()


class StandIn:
    """Writes the input as result; a seed of 1 is refused, 2 breaks, 3 goes on until it is stopped."""

    def __init__(self) -> None:
        self.ended = threading.Event()

    def restore(self, photograph: Photograph, seed: int, folder, tell) -> None:
        try:
            tell({"type": "begun", "tiles": seed})
            if seed == 1:
                raise ImageRefused("is too green")
            if seed == 2:
                raise RuntimeError("broken")
            while seed == 3:
                tell({"type": "chain"})
                time.sleep(0.01)
            for name in ("before", "restored"):
                write_png(folder / f"{name}.png", photograph.colour)
            tell({"type": "done"})
        finally:
            self.ended.set()


@pytest.fixture
def standin():
    return StandIn()


@pytest.fixture
def client(standin, tmp_path):
    app = demo_app(standin, tmp_path / "out", local=True)
    return TestClient(app, base_url="http://127.0.0.1", raise_server_exceptions=False)


def events(answer) -> list[dict]:
    assert answer.status_code == 200
    return [json.loads(line) for line in answer.content.splitlines()]


def refusal(answer) -> tuple[int, str]:
    error = answer.json()["error"]
    assert set(error) == {"type", "message"} and error["message"]
    return answer.status_code, error["type"]


def test_events_come_line_by_line_and_results_stay(client, tmp_path):
    told = events(client.post(f"{CALL}?seed=0", content=png(), headers=BINARY))
    assert [event["type"] for event in told] == ["begun", "done"]
    key = told[-1]["id"]
    for name in ("before.png", "restored.png"):
        answer = client.get(f"{CALL}/{key}/{name}")
        assert answer.content == (tmp_path / "out" / key / name).read_bytes()
    assert sorted(path.name for path in (tmp_path / "out" / key).iterdir()) == ["before.png", "restored.png"]
    for path in (f"{key}/upload", f"{key}/..%2f..%2fpasswd", "0/restored.png", f"../{key}/restored.png"):
        assert client.get(f"{CALL}/{path}").status_code == 404
    assert [client.get(path).status_code for path in ("/", "/demo.js", "/demo.css")] == [200] * 3


def test_what_goes_wrong_is_told_and_the_next_photograph_is_restored(client, tmp_path):
    for seed, message in ((1, "The photograph is too green."), (2, "RuntimeError: broken")):
        told = events(client.post(f"{CALL}?seed={seed}", content=png(), headers=BINARY))
        assert told[-1]["type"] == "failed" and told[-1]["message"] == message
        assert refusal(client.get(f"{CALL}/{told[-1]['id']}/restored.png")) == (404, "no_result")
        assert not list((tmp_path / "out").iterdir())
    assert events(client.post(CALL, content=png(), headers=BINARY))[-1]["type"] == "done"


@pytest.mark.parametrize(
    ("content", "headers", "query", "expected"),
    [
        (b"text", BINARY, "", (422, "not_restorable")),
        (b"", BINARY, "", (422, "not_restorable")),
        (png(200, 200)[:-40], BINARY, "", (422, "not_restorable")),
        (png(9000, 8000, "1"), BINARY, "", (422, "not_restorable")),
        (b" " * (MOST_BYTES + 1), BINARY, "", (413, "too_large")),
        (png(), {"content-type": "image/png"}, "", (415, "wrong_content_type")),
        (png(), {"content-type": "multipart/form-data"}, "", (415, "wrong_content_type")),
        (png(), BINARY, "?seed=-1", (422, "invalid")),
        (png(), BINARY, "?seed=" + "9" * 5000, (422, "invalid")),
        (png(), {**BINARY, "host": "attacker.example"}, "", (400, "wrong_host")),
    ],
)
def test_hostile_requests_get_typed_answers_and_leave_nothing(client, tmp_path, content, headers, query, expected):
    assert refusal(client.post(CALL + query, content=content, headers=headers)) == expected
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


class Listener:
    """One request as the server sees it: ``heard`` fills with its events, and it leaves when told to."""

    def __init__(self, app, seed: int) -> None:
        self.heard: list[dict] = []
        self.status = 0
        self.leave = asyncio.Event()
        self._messages = [{"type": "http.request", "body": png()}]
        headers = [(b"host", b"localhost"), (b"content-type", b"application/octet-stream")]
        scope = {"type": "http", "method": "POST", "path": CALL, "root_path": "", "headers": headers}
        self.task = asyncio.create_task(
            app({**scope, "query_string": f"seed={seed}".encode()}, self._receive, self._send)
        )

    async def until(self, kind: str) -> None:
        while kind not in [event["type"] for event in self.heard]:
            await asyncio.sleep(0.01)

    async def _receive(self):
        if self._messages:
            return self._messages.pop()
        await self.leave.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message):
        self.status = message.get("status", self.status)
        if message.get("body"):
            self.heard.append(json.loads(message["body"]) if self.status == 200 else {"type": "refused"})


def test_one_waits_for_the_other_and_a_restoration_ends_when_its_client_has_gone(client, standin, tmp_path):
    async def visit() -> None:
        first = Listener(client.app, seed=3)
        await first.until("chain")
        second = Listener(client.app, seed=0)
        await second.until("waiting")
        third = Listener(client.app, seed=0)
        await third.until("waiting")
        assert [event["before"] for event in (*second.heard, *third.heard)] == [1, 2]
        crowd = [Listener(client.app, seed=0) for _ in range(MOST_OPEN - 3)]
        for listener in crowd:
            await listener.until("waiting")
        late = Listener(client.app, seed=0)
        await late.until("refused")
        assert late.status == 503
        third.leave.set()
        first.leave.set()
        await second.until("done")
        await asyncio.gather(*(listener.task for listener in (first, second, third, late, *crowd)))
        assert "done" not in [event["type"] for event in (*first.heard, *third.heard)]
        for listener in crowd:
            await listener.until("done")

    asyncio.run(asyncio.wait_for(visit(), 120))
    assert standin.ended.wait(60)
    assert len(list((tmp_path / "out").iterdir())) == 1 + MOST_OPEN - 3  # of those who left, nothing


# what is told of a chain


class Scripted:
    """In the sampler's place: writes a given chain for each prompt, the first ``broken`` of them without their end."""

    def __init__(self, family, decoder, broken: int) -> None:
        self._builder, self._decoder, self._broken = family.builder, decoder, broken
        rng = np.random.default_rng(0)
        codes = [rng.integers(0, CODEBOOK, grid) for grid in family.grammar.grids]
        self.ids = self._builder.chain(("[blur]", "a cat", "a tabby", "eyes"), codes).tolist()
        self.seeds: list[int] = []

    def generate(self, prompt, watch):
        self.seeds.append(prompt.seed)
        ids = self.ids[: -1 if len(self.seeds) <= self._broken else None]
        for token in ids:
            watch(0, token)
        raw = RawSample(ids, [0.0] * len(ids), (VersionSpan(0, 0, len(ids)),), "stop")
        return Group(prompt, build_samples(self._builder, self._decoder, [raw]), 0.0, "scripted")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    root = tmp_path_factory.mktemp("family")
    random_policy(root / "policy")
    write_image_tokenizer(root / "vq", CODEBOOK)
    return Checkpoint(root / "policy", root / "vq", INSTRUCTION, 1.0)


def restored(checkpoint, monkeypatch, folder, broken: int, size=(24, 16)) -> tuple[list[dict], Scripted]:
    scripted = []

    def sampler(model, family, decoder, **settings):
        scripted.append(Scripted(family, decoder, broken))
        return scripted[0]

    monkeypatch.setattr(restoring, "ReferenceSampler", sampler)
    told: list[dict] = []
    restorer = restoring.Restorer(checkpoint, 4, "cpu", most_tiles=2)
    photograph = Photograph(np.full((size[1], size[0], 3), 120, np.uint8))
    try:
        restorer.restore(photograph, 0, folder, told.append)
    except ImageRefused as error:
        told.append({"type": "refused", "message": str(error)})
    return told, scripted[0]


def test_steps_are_told_in_order_and_a_broken_chain_is_asked_for_again(checkpoint, monkeypatch, tmp_path):
    told, sampler = restored(checkpoint, monkeypatch, tmp_path, broken=1)
    kinds = [event["type"] for event in told if event["type"] != "chain"]
    assert kinds == ["begun", *["tile", *["image"] * 3, "again"], *["tile", *["image"] * 3] * 2, "done"]
    assert sampler.seeds == [0, 1 << 32, 1]
    assert told[0]["tiles"] == 2 and told[0]["result"] == [96, 64]
    assert told[1]["box"] == pytest.approx([0, 0, 2 / 3, 1]) and told[-2]["type"] == "chain"
    assert [event["size"] for event in told if event["type"] == "image"][:3] == [16, 32, 64]
    texts = {"degradation": "[blur]", "rough_understand": "a cat", "middle_understand": "a tabby"}
    assert told[-2]["texts"] == {**texts, "final_understand": "eyes"}
    assert told[-1]["tokens"] == 3 * len(sampler.ids) - 1
    with Image.open(tmp_path / "restored.png") as image:
        assert image.size == (96, 64)
    told, sampler = restored(checkpoint, monkeypatch, tmp_path, broken=9)
    assert told[-1]["type"] == "refused" and "no complete chain in 4 attempts" in told[-1]["message"]
    assert len(sampler.seeds) == 4


def test_a_large_photograph_is_shrunk_until_its_tiles_are_few_enough():
    drawing = Drawing(64, 4, tile=64, overlap=16)
    deep = Photograph(np.full((300, 400, 3), 60000, np.uint16), np.full((300, 400), 7, np.uint16))
    small = restoring.shrunk(deep, drawing, 16)
    assert len(drawing.plan(*small.size)) <= 16
    assert small.colour.dtype == np.uint16 and np.ptp(small.colour) <= 1 and small.alpha.shape == small.size
    assert len(drawing.plan(*[length + 2 for length in small.size])) > 16
    assert restoring.shrunk(small, drawing, 16) is small
    with pytest.raises(ImageRefused, match="too long and narrow"):
        restoring.shrunk(Photograph(np.zeros((2, 3000, 3), np.uint8)), drawing, 16)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--checkpoint", "nowhere"], "nowhere is neither a policy"),
        (["--checkpoint", "nowhere", "--upscale", "nan"], "--upscale nan: a number from 1 to 16"),
        (["--checkpoint", "nowhere", "--most-tiles", "0"], "--most-tiles 0"),
        (["--checkpoint", "nowhere", "--port", "x"], "'x' is not a port"),
    ],
)
def test_wrong_arguments_end_with_one_line_and_code_2(arguments, message, capsys):
    assert main(["demo", *arguments]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
