"""The HTTP side without a network: exact answers, typed errors, nobody in without the token."""

from __future__ import annotations

import asyncio
import base64
import io
import json

import httpx
import numpy as np
import pytest
from PIL import Image

from reward_servers.contract import Judgement, Tags
from reward_servers.http_guard import TOKEN_VARIABLE, Guard, token_of_environment
from reward_servers.http_images import ImagePayload, Limits
from reward_servers.http_payloads import ANSWERS, ErrorAnswer, encode
from reward_servers.http_routes import ROUTES, replica, routes
from tests.reward_servers.http_fakes import PICTURE, TOKEN, Replica

pytestmark = pytest.mark.unit

CALLS = [
    ("grounded_sam", "objects", {"image": PICTURE}),
    ("grounded_sam", "objects", {"image": PICTURE, "names": ["cup"], "masks": True}),
    ("qwen_vl", "judge", {"lr": PICTURE[:2], "images": [PICTURE, PICTURE[::-1]], "seed": 0}),
    ("qwen_vl", "caption", {"image": PICTURE}),
    ("qwen_vl", "tag", {"image": PICTURE}),
    ("iqa", "measure", {"images": [PICTURE, PICTURE[::-1]], "reference": PICTURE}),
]
IMAGE = ImagePayload.of(PICTURE).model_dump(exclude_none=True)
JUDGE = {"lr": IMAGE, "images": [IMAGE], "seed": 0}
ONE_PIXEL = ImagePayload.of(PICTURE[:1, :1]).model_dump(exclude_none=True)


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setenv(TOKEN_VARIABLE, TOKEN)


def app_of(server, stand_in):
    app = routes(server)
    app.dependency_overrides[replica] = stand_in
    return app


def send(server, method, path, stand_in=Replica, token=TOKEN, **options) -> httpx.Response:
    async def request():
        transport = httpx.ASGITransport(app_of(server, stand_in), raise_app_exceptions=False)
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        async with httpx.AsyncClient(transport=transport, base_url="http://test", headers=headers) as client:
            return await client.request(method, path, **options)

    return asyncio.run(request())


def refused(response: httpx.Response, status: int, kind: str) -> str:
    error = ErrorAnswer.model_validate_json(response.content).error
    assert (response.status_code, error.type) == (status, kind), response.text
    assert TOKEN not in response.text and len(error.message) < 400
    return error.message


@pytest.mark.parametrize(("server", "method", "arguments"), CALLS)
def test_an_answer_over_http_equals_a_direct_call_exactly(server, method, arguments):
    direct = asyncio.run(getattr(Replica(), method)(**arguments))
    response = send(server, "POST", f"/{method}", json=encode(arguments))
    assert response.status_code == 200, response.text
    answer = ANSWERS[method].model_validate_json(response.content).answer()
    assert answer == direct
    if method == "objects" and arguments.get("masks"):
        np.testing.assert_array_equal(answer.objects[0].mask, direct.objects[0].mask)


def test_ready_says_who_serves():
    response = send("iqa", "GET", "/ready")
    assert response.json() == {"about": {"pid": 1, "versions": {"torch": "2"}, "settings": {}}}


@pytest.mark.parametrize("token", [None, "", TOKEN[:-1], TOKEN + "x", "Bearer", "ü" * 20])
def test_nobody_gets_in_without_the_token(token):
    for method, path in (("POST", "/objects"), ("GET", "/ready"), ("GET", "/openapi.json"), ("GET", "/nothing")):
        headers = {"Authorization": f"Bearer {token}".encode()} if token is not None else {}
        response = send("grounded_sam", method, path, token=None, headers=headers, content=b"x" * 10)
        refused(response, 401, "unauthorised")


@pytest.mark.parametrize("token", [None, "", "short", "with a space in it 123", "zeilen\numbruch-1234567", "ü" * 20])
def test_a_server_does_not_start_without_a_proper_token(monkeypatch, token):
    monkeypatch.delenv(TOKEN_VARIABLE) if token is None else monkeypatch.setenv(TOKEN_VARIABLE, token)
    with pytest.raises(ValueError, match=f"need a token in {TOKEN_VARIABLE}") as error:
        token_of_environment()
    assert not token or token not in str(error.value)
    with pytest.raises(ValueError):
        Guard(None)


@pytest.mark.parametrize(
    ("server", "path", "body", "status", "kind", "said"),
    [
        ("grounded_sam", "/objects", {"image": ONE_PIXEL}, 400, "bad_request", "1x1"),
        ("grounded_sam", "/objects", {"image": {"png": "/etc/passwd"}}, 400, "bad_request", "not a path"),
        ("grounded_sam", "/objects", {"image": {"path": "/etc/passwd"}}, 422, "invalid", "image.path: Extra inputs"),
        ("grounded_sam", "/objects", {"image": IMAGE, "pickle": "gASV"}, 422, "invalid", "pickle: Extra inputs"),
        ("grounded_sam", "/objects", {}, 422, "invalid", "image: Field required"),
        ("grounded_sam", "/objects", {"image": IMAGE, "names": []}, 422, "invalid", "names"),
        ("grounded_sam", "/objects", [], 422, "invalid", "the body"),
        ("qwen_vl", "/judge", {"lr": IMAGE, "images": [], "seed": 0}, 422, "invalid", "images"),
        ("qwen_vl", "/judge", {"lr": IMAGE, "images": [IMAGE] * 65, "seed": 0}, 422, "invalid", "images"),
        ("qwen_vl", "/judge", {"lr": IMAGE, "images": [IMAGE], "seed": -1}, 422, "invalid", "seed"),
        ("qwen_vl", "/judge", {"lr": IMAGE, "images": [IMAGE], "seed": 1}, 502, "no_answer", "no usable answer"),
        ("qwen_vl", "/judge", {"lr": IMAGE, "images": [IMAGE], "seed": 2}, 500, "internal", "KeyError"),
        ("iqa", "/measure", {"images": [IMAGE]}, 400, "bad_request", "none was sent"),
        ("iqa", "/nothing", {}, 404, "bad_request", "Not Found"),
    ],
)
def test_each_failure_has_its_type_and_its_reason(server, path, body, status, kind, said):
    message = refused(send(server, "POST", path, json=body), status, kind)
    assert said in message and "secret" not in message


@pytest.mark.parametrize("body", [b"", b"{", b'{"image": NaN}', b"\xff\xfe", json.dumps({"image": 5}).encode()])
def test_a_body_that_is_no_request_is_invalid(body):
    headers = {"Content-Type": "application/json"}
    refused(send("grounded_sam", "POST", "/objects", content=body, headers=headers), 422, "invalid")


def test_other_content_types_are_refused_before_they_are_read():
    for kind in ("application/octet-stream", "multipart/form-data", "application/x-pickle", ""):
        response = send("grounded_sam", "POST", "/objects", content=b"x", headers={"Content-Type": kind})
        refused(response, 415, "no_json")


def guarded(messages, limits, **headers):
    """Send ASGI messages through a guard; what it answered, and whether the application was reached."""
    reached, sent = [], []

    async def app(scope, receive, send):
        reached.append(await receive())

    async def send(message):
        sent.append(message)

    pending = list(messages)

    async def receive():
        if not pending:
            await asyncio.sleep(60)
        return pending.pop(0)

    given = {"authorization": f"Bearer {TOKEN}", "content-type": "application/json"} | headers
    scope = {"type": "http", "method": "POST", "headers": [(k.encode(), v.encode()) for k, v in given.items()]}
    asyncio.run(Guard(app, limits)(scope, receive, send))
    return (sent[0]["status"] if sent else None), reached


def piece(size: int, more: bool) -> dict:
    return {"type": "http.request", "body": bytes(size), "more_body": more}


def test_bodies_are_limited_while_they_arrive():
    limits = Limits(body_bytes=100, body_s=0.05)
    assert guarded([piece(10, False)], limits, **{"content-length": "101"}) == (413, [])
    assert guarded([piece(60, True), piece(60, True)], limits) == (413, [])
    assert guarded([piece(60, True)], limits) == (408, [])
    assert guarded([piece(60, True), {"type": "http.disconnect"}], limits) == (None, [])
    status, reached = guarded([piece(60, True), piece(40, False)], limits)
    assert status is None and len(reached[0]["body"]) == 100


@pytest.mark.parametrize("server", ROUTES)
def test_the_description_names_every_route_and_every_error(server):
    described = routes(server, guarded=False).openapi()
    assert set(described["paths"]) == {f"/{method}" for method in ROUTES[server]} | {"/ready"}
    for methods in described["paths"].values():
        for operation in methods.values():
            assert {"200", "400", "401", "404", "405", "408", "413", "415", "422", "500", "502"} <= set(
                operation["responses"]
            )


def test_what_is_encoded_is_what_the_request_models_read():
    for server, method, arguments in CALLS:
        read = ROUTES[server][method].model_validate(encode(arguments)).arguments()
        for name, value in arguments.items():
            np.testing.assert_array_equal(read[name], value)
    assert base64.b64decode(encode({"image": PICTURE})["image"]["raw"]) == PICTURE.tobytes()


class Nonsense(Replica):
    """A model that answers NaN, and one whose answer is of another kind."""

    async def judge(self, lr, images, seed):
        return [Judgement(1.0, float("nan"), 1.0)]

    async def tag(self, image):
        return Tags((7,))


@pytest.mark.parametrize(
    ("method", "arguments", "said"),
    [
        (
            "judge",
            {"lr": PICTURE, "images": [PICTURE], "seed": 0},
            "judge cannot be sent: realism: Input should be a f",
        ),
        ("tag", {"image": PICTURE}, "tag cannot be sent: names.0: Input should be a valid string"),
    ],
)
def test_an_unusable_answer_is_the_servers_fault_and_not_the_requests(method, arguments, said):
    message = refused(send("qwen_vl", "POST", f"/{method}", Nonsense, json=encode(arguments)), 502, "no_answer")
    assert said in message


@pytest.mark.parametrize(("field", "value"), [("seed", "0"), ("seed", 0.0), ("seed", True), ("masks", "yes")])
def test_types_are_not_guessed(field, value):
    call = ("grounded_sam", "/objects", {"image": IMAGE}) if field == "masks" else ("qwen_vl", "/judge", JUDGE)
    message = refused(send(call[0], "POST", call[1], json=call[2] | {field: value}), 422, "invalid")
    assert message.startswith(field)


def test_small_files_that_hold_too_many_pixels_together_are_not_decoded(monkeypatch):
    flat = io.BytesIO()
    Image.new("RGB", (4096, 4096)).save(flat, "PNG")
    image = {"png": base64.b64encode(flat.getvalue()).decode()}
    monkeypatch.setattr(ImagePayload, "array", lambda self: pytest.fail("decoded"))
    for server, path, body in (("qwen_vl", "/judge", JUDGE), ("iqa", "/measure", {"reference": IMAGE})):
        response = send(server, "POST", path, json=body | {"images": [image] * 5})
        assert "at most 67108864 in all" in refused(response, 400, "bad_request")


def test_another_method_is_told_what_is_allowed():
    response = send("grounded_sam", "GET", "/objects")
    refused(response, 405, "bad_request")
    assert response.headers["allow"] == "POST"
    refused(send("grounded_sam", "POST", "/objects/", json={"image": IMAGE}), 404, "bad_request")
