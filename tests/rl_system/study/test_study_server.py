"""The study's server without a browser: what it answers, stores and refuses."""

from __future__ import annotations

import asyncio
import io
import json
import sqlite3

import numpy as np
import pytest
from PIL import Image, PngImagePlugin
from starlette.testclient import TestClient

from rl_system.studies.evaluate.images import EvaluationRefused, read_rgb
from rl_system.studies.study.app import study_app
from rl_system.studies.study.material import Material, collect, order_for
from rl_system.studies.study.votes import VoteBook, tallies
from tests.rl_system.study.photographs import METHODS, write_folders

pytestmark = pytest.mark.unit
CALLS = "/api/participants"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("study")
    write_folders(root, number=4, size=24)
    return root


@pytest.fixture(scope="module")
def material(folders) -> Material:
    return collect([("Photos", folders / "lr")], [(name, folders / name) for name in METHODS])


@pytest.fixture
def book(material, tmp_path):
    opened = VoteBook(tmp_path / "votes.sqlite", material, seed=3)
    yield opened
    opened.close()


@pytest.fixture
def client(material, book):
    return TestClient(study_app(material, book, local=True), base_url="http://127.0.0.1", raise_server_exceptions=False)


@pytest.fixture
def code(client) -> str:
    answer = client.post(CALLS, json={})
    assert answer.status_code == 201
    return answer.json()["code"]


def refusal(answer) -> tuple[int, str]:
    """Status and type of an error, which is JSON with a sentence."""
    error = answer.json()["error"]
    assert set(answer.json()) == {"error"} and set(error) == {"type", "message"} and error["message"]
    return answer.status_code, error["type"]


def test_a_second_vote_replaces_the_first_and_undo_deletes(client, code, tmp_path):
    order = order_for(code, 3, 4, 3)
    for picture in (1, 3):
        answer = client.put(f"{CALLS}/{code}/votes/2", json={"picture": picture})
        assert answer.json() == {"image": 2, "picture": picture}
    assert client.put(f"{CALLS}/{code}/votes/1", json={"picture": 2}).status_code == 200
    progress = client.get(f"{CALLS}/{code}").json()
    votes = [{"image": 2, "picture": 3}, {"image": 1, "picture": 2}]
    assert progress == {"images": 4, "pictures": 3, "votes": votes}
    stored = sqlite3.connect(tmp_path / "votes.sqlite").execute("SELECT participant, image, method FROM vote")
    assert sorted(stored) == sorted([(code, order[1][0], order[1][1][2]), (code, order[0][0], order[0][1][1])])
    assert client.delete(f"{CALLS}/{code}/votes/2").status_code == 204
    assert client.get(f"{CALLS}/{code}").json()["votes"] == votes[1:]
    assert refusal(client.delete(f"{CALLS}/{code}/votes/2")) == (404, "no_vote")


@pytest.mark.parametrize(
    ("method", "path", "body", "expected"),
    [
        ("GET", "/nobody", None, (404, "no_participant")),
        ("PUT", "/nobody/votes/1", {"picture": 1}, (404, "no_participant")),
        ("DELETE", "/nobody/votes/1", None, (404, "no_participant")),
        ("GET", "/nobody/images/1/1", None, (404, "no_participant")),
        ("GET", "/' OR 1=1 --", None, (404, "no_participant")),
        ("PUT", "/CODE/votes/0", {"picture": 1}, (404, "no_image")),
        ("PUT", "/CODE/votes/5", {"picture": 1}, (404, "no_image")),
        ("PUT", "/CODE/votes/-1", {"picture": 1}, (404, "no_image")),
        ("PUT", f"/CODE/votes/{'9' * 6000}", {"picture": 1}, (404, "no_image")),
        ("GET", "/CODE/images/9/1", None, (404, "no_image")),
        ("GET", "/CODE/images/1/4", None, (404, "no_picture")),
        ("GET", "/CODE/images/1/bicubic", None, (404, "no_picture")),
        ("GET", "/CODE/images/1/..%2f..%2fetc%2fpasswd", None, (404, "not_found")),
        ("PUT", "/CODE/votes/1", {"picture": 0}, (422, "invalid")),
        ("PUT", "/CODE/votes/1", {"picture": 4}, (422, "invalid")),
        ("PUT", "/CODE/votes/1", {"picture": True}, (422, "invalid")),
        ("PUT", "/CODE/votes/1", {"picture": "1"}, (422, "invalid")),
        ("PUT", "/CODE/votes/1", {"picture": 1e300}, (422, "invalid")),
        ("PUT", "/CODE/votes/1", [1], (422, "invalid")),
        ("PUT", "/CODE/votes/1", {"picture": 1, "more": "x" * 2000}, (413, "too_large")),
        ("POST", "", {"more": "x" * 10_000_000}, (413, "too_large")),
        ("PATCH", "/CODE/votes/1", {"picture": 1}, (405, "method_not_allowed")),
        ("GET", "/CODE/other", None, (404, "not_found")),
    ],
)
def test_wrong_requests_get_typed_answers_and_store_nothing(client, code, book, method, path, body, expected):
    answer = client.request(method, CALLS + path.replace("CODE", code), json=body)
    assert refusal(answer) == expected
    assert book.votes(code) == []


def test_bodies_are_json_and_read_no_further_than_allowed(client, code):
    path = f"{CALLS}/{code}/votes/1"
    json_type = {"content-type": "application/json"}
    assert refusal(client.put(path, content=b"not json", headers=json_type)) == (422, "invalid")
    assert refusal(client.put(path, content=b"[" * 1000, headers=json_type)) == (422, "invalid")
    assert refusal(client.put(path, content=b"\xff\xfe", headers=json_type)) == (422, "invalid")
    long = {**json_type, "content-length": "9" * 5000}
    assert refusal(client.put(path, content=b"{}", headers=long)) == (413, "too_large")
    for form in ("text/plain", "application/x-www-form-urlencoded"):  # what a foreign page could send unasked
        refused = client.put(path, content=b'{"picture": 1}', headers={"content-type": form})
        assert refusal(refused) == (415, "wrong_content_type")


def test_an_endless_body_is_not_read_to_its_end(client, code):
    taken, statuses = 0, []

    async def receive():
        nonlocal taken
        taken += 1
        return {"type": "http.request", "body": b" " * 100, "more_body": True}

    async def send(message):
        statuses.append(message.get("status"))

    headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
    path = f"{CALLS}/{code}/votes/1"
    scope = {"type": "http", "method": "PUT", "path": path, "headers": headers, "query_string": b"", "root_path": ""}
    asyncio.run(client.app(scope, receive, send))
    assert statuses[0] == 413 and taken == 11


def test_a_name_that_only_pretends_to_be_this_machine_is_refused(client, code):
    answer = client.get(f"{CALLS}/{code}", headers={"host": "attacker.example"})
    assert refusal(answer) == (400, "wrong_host")
    for host in ("localhost:8321", "127.0.0.1:1", "[::1]:8321"):
        assert client.get(f"{CALLS}/{code}", headers={"host": host}).status_code == 200


def test_pictures_come_in_the_participants_order_without_their_files_metadata(material, book, folders, tmp_path):
    marked = PngImagePlugin.PngInfo()
    marked.add_text("Software", "bicubic")
    with Image.open(folders / "bicubic" / f"{material.items[0].name}.png") as image:
        image.save(tmp_path / "marked.png", pnginfo=marked)
    first = material.items[0]
    items = (type(first)("Photos", first.name, first.photograph, (tmp_path / "marked.png", *first.results[1:])),)
    client = TestClient(
        study_app(Material(METHODS, items, material.digests[:1]), book, local=True), base_url="http://localhost"
    )
    code = client.post(CALLS, json={}).json()["code"]
    ((_, methods),) = order_for(code, book.seed, 1, 3)
    for picture, path in enumerate((first.photograph, *(items[0].results[m] for m in methods))):
        answer = client.get(f"{CALLS}/{code}/images/1/{picture}")
        assert answer.headers["content-type"] == "image/png" and b"bicubic" not in answer.content
        assert not {"last-modified", "etag"} & set(answer.headers)
        with Image.open(io.BytesIO(answer.content)) as shown:
            assert not shown.info and np.array_equal(np.asarray(shown), read_rgb(path))


def test_the_page_asks_for_nothing_from_elsewhere(client):
    for path in ("/", "/study.js", "/study.css"):
        answer = client.get(path)
        assert answer.status_code == 200 and "default-src 'none'" in answer.headers["content-security-policy"]
        assert "//" not in answer.text.replace("/** ", "").replace("// ", "")
        assert not [name for name in METHODS if name in answer.text]


def test_orders_are_fair_and_the_same_every_time():
    codes = [f"participant{i}" for i in range(600)]
    orders = [order_for(code, 5, 4, 3) for code in codes]
    assert orders == [order_for(code, 5, 4, 3) for code in codes]
    assert orders != [order_for(code, 6, 4, 3) for code in codes]
    assert all(sorted(item for item, _ in order) == [0, 1, 2, 3] for order in orders)
    first = np.bincount([methods[0] for order in orders for _, methods in order])
    assert np.all(abs(first - 800) < 100)  # 4.3 standard deviations of 2,400 draws at 1/3


def test_a_study_goes_on_only_with_the_same_images_and_methods(material, folders, tmp_path):
    path = tmp_path / "votes.sqlite"
    book = VoteBook(path, material, seed=None)
    code, seed = book.new_participant(), book.seed
    book.cast(code, 2, 1)
    book.close()
    again = VoteBook(path, material, seed=None)
    assert again.seed == seed and again.votes(code) == [(2, 1)]
    again.close()
    turned = collect([("Photos", folders / "lr")], [(name, folders / name) for name in reversed(METHODS)])
    changed = Material(material.methods, material.items, (*material.digests[:3], "0" * 64))
    for other, number, message in (
        (turned, None, "is the study of bicubic, lanczos, nearest, in this order"),
        (changed, None, f"Photos/{material.items[3].name} is one that differs"),
        (material, seed + 1, f"begun with seed {seed}"),
    ):
        with pytest.raises(EvaluationRefused, match=message):
            VoteBook(path, other, number)
    (tmp_path / "text.sqlite").write_text("no database, but some text that is long enough to be one")
    with sqlite3.connect(tmp_path / "other.sqlite") as other_db:
        other_db.execute("CREATE TABLE a (b)")
    for name in ("text", "other"):
        with pytest.raises(EvaluationRefused, match=r"is no file of a study"):
            VoteBook(tmp_path / f"{name}.sqlite", material, None)
        with pytest.raises(EvaluationRefused, match=r"is no file of a study"):
            tallies(tmp_path / f"{name}.sqlite")


def test_results_that_would_give_themselves_away_by_size_are_refused(folders, tmp_path):
    for path in (folders / "nearest").iterdir():
        with Image.open(path) as image:
            image.resize((90, 96)).save(tmp_path / path.name)
    methods = [("bicubic", folders / "bicubic"), ("other", tmp_path)]
    with pytest.raises(EvaluationRefused, match="differ in size"):
        collect([("Photos", folders / "lr")], methods)
    with pytest.raises(EvaluationRefused, match="2 to 9 methods, 1 given"):
        collect([("Photos", folders / "lr")], methods[:1])


def test_votes_that_cannot_be_stored_are_said_to_be_so(client, code, tmp_path):
    with sqlite3.connect(tmp_path / "votes.sqlite") as db:
        db.execute("DROP TABLE vote")
    answer = client.put(f"{CALLS}/{code}/votes/1", json={"picture": 1})
    assert refusal(answer) == (503, "unavailable") and "no such table" not in json.dumps(answer.json())
