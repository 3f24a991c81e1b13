"""The client's HTTP transport against a real server on the loopback: equal answers, every failure told apart."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from contextlib import contextmanager

import pytest
import uvicorn
from fastapi import FastAPI
from starlette.responses import Response

from reward_servers import http_transport
from reward_servers.client import RewardClient
from reward_servers.contract import OverloadedError, RewardServerError
from reward_servers.http_guard import TOKEN_VARIABLE
from reward_servers.http_images import Limits
from reward_servers.http_routes import ROUTES, replica, routes
from reward_servers.http_transport import HttpTransport
from reward_servers.retry import RetryPolicy
from tests.reward_servers.http_fakes import PICTURE, TOKEN, Replica
from tests.reward_servers.test_http_routes import CALLS
from vlcot.groups import Failed

pytestmark = pytest.mark.engine


INTERNAL = json.dumps({"error": {"type": "internal", "message": "KeyError"}}).encode()


@contextmanager
def served(app):
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_level="critical"))
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        try:
            while not server.started:
                time.sleep(0.01)
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = server.force_exit = True
            thread.join()


@pytest.fixture(scope="module")
def url():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(TOKEN_VARIABLE, TOKEN)
        app = FastAPI()
        for server in ROUTES:
            inner = routes(server)
            inner.dependency_overrides[replica] = Replica
            app.mount(f"/{server}", inner)
        with served(app) as address:
            yield address


def call(url, server, method, arguments, token=TOKEN):
    async def one():
        transport = HttpTransport(url, token)
        try:
            return await transport.call(server, method, arguments)
        finally:
            await transport.close()

    return asyncio.run(one())


@pytest.mark.parametrize(("server", "method", "arguments"), CALLS)
def test_answers_equal_a_direct_call_exactly(url, server, method, arguments):
    assert call(url, server, method, arguments) == asyncio.run(getattr(Replica(), method)(**arguments))


def test_ready_comes_through(url):
    assert call(url, "iqa", "ready", {})["versions"] == {"torch": "2"}


@pytest.mark.parametrize(
    ("arguments", "token", "error", "said"),
    [
        ({"image": PICTURE[:1, :1]}, TOKEN, ValueError, "answered 400: an image of 1x1"),
        ({"image": PICTURE, "names": []}, TOKEN, ValueError, "answered 422: names"),
        ({"image": PICTURE}, "wrong", ValueError, "answered 401: the bearer token"),
        ({"image": PICTURE[..., 0]}, TOKEN, ValueError, "must be uint8"),
    ],
)
def test_a_request_at_fault_is_a_value_error(url, arguments, token, error, said):
    with pytest.raises(error, match=said) as caught:
        call(url, "grounded_sam", "objects", arguments, token)
    assert TOKEN not in str(caught.value)


def test_a_body_beyond_the_limit_is_not_sent(monkeypatch):
    monkeypatch.setattr(http_transport, "LIMITS", Limits(body_bytes=100))
    with pytest.raises(ValueError, match="reads at most 100"):
        call("http://127.0.0.1:9", "grounded_sam", "objects", {"image": PICTURE})


def test_a_server_at_fault_is_not(url):
    arguments = {"lr": PICTURE, "images": [PICTURE]}
    for seed, said in ((1, "answered 502: no usable"), (2, "answered 500: KeyError")):
        with pytest.raises(RewardServerError, match=said):
            call(url, "qwen_vl", "judge", arguments | {"seed": seed})


@pytest.mark.parametrize(
    ("status", "body", "error", "said"),
    [
        (200, b"<html>", RewardServerError, "no answer that can be read"),
        (200, b'{"objects": []}', RewardServerError, "no answer that can be read"),
        (200, b'{"objects": [], "main": [], "more": 1}', RewardServerError, "no answer that can be read"),
        (503, b"Request dropped", OverloadedError, "answered 503: Request dropped"),
        (429, b"", OverloadedError, "answered 429"),
        (404, b"no such route", RewardServerError, "answered 404: no such route"),
        (408, b"", RewardServerError, "answered 408"),
        (
            500,
            json.dumps({"error": {"type": "internal", "message": "KeyError"}}).encode(),
            RewardServerError,
            "KeyError",
        ),
    ],
)
def test_whatever_else_a_server_says_is_told_apart(status, body, error, said):
    app = FastAPI()
    app.post("/grounded_sam/objects")(lambda: Response(body, status))
    with served(app) as address, pytest.raises(error, match=said) as caught:
        call(address, "grounded_sam", "objects", {"image": PICTURE})
    assert (type(caught.value) is OverloadedError) == (error is OverloadedError)


def test_nobody_there():
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{closed.getsockname()[1]}"
    with pytest.raises(RewardServerError, match="cannot be reached"):
        call(address, "iqa", "ready", {})


def test_a_server_that_hangs_up():
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def hang_up():
            for _ in range(2):  # aiohttp sends a GET again by itself
                listening.accept()[0].close()

        threading.Thread(target=hang_up, daemon=True).start()
        with pytest.raises(RewardServerError, match="cannot be reached"):
            call(f"http://127.0.0.1:{listening.getsockname()[1]}", "iqa", "ready", {})


def test_a_server_that_hangs_ends_at_the_clients_deadline():
    app = FastAPI()

    async def hang():
        await asyncio.sleep(60)

    app.post("/grounded_sam/objects")(hang)

    async def ask(address):
        client = RewardClient(HttpTransport(address, TOKEN), timeout_s=0.3, retry=RetryPolicy(attempts=1))
        try:
            return await client.objects(PICTURE)
        finally:
            await client.close()

    with served(app) as address:
        answer = asyncio.run(ask(address))
    assert isinstance(answer, Failed) and "no answer in time" in answer.reason
