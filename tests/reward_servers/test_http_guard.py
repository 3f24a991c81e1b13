"""The guard in front of a real server: slow, silent and greedy senders end with their error, others are served."""

from __future__ import annotations

import logging
import socket
from contextlib import ExitStack

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from reward_servers.http_guard import TOKEN_VARIABLE, Guard
from reward_servers.http_images import Limits
from tests.reward_servers.http_fakes import TOKEN
from tests.reward_servers.test_http_transport import served

pytestmark = pytest.mark.engine

LIMITS = Limits(body_bytes=100, body_s=0.2)


async def length(request: Request) -> PlainTextResponse:
    return PlainTextResponse(str(len(await request.body())))


@pytest.fixture(scope="module")
def address():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(TOKEN_VARIABLE, TOKEN)
        inner = Starlette(routes=[Route("/x", length, methods=["POST", "GET"])])
        with served(Guard(inner, LIMITS)) as url:
            yield ("127.0.0.1", int(url.rsplit(":", 1)[1]))


def asked(*lines: str, body: str = "", method: str = "POST", token: str = TOKEN) -> bytes:
    head = [f"{method} /x HTTP/1.1", "Host: t", "Connection: close", f"Authorization: Bearer {token}", *lines]
    return ("\r\n".join(head) + "\r\n\r\n" + body).encode()


def answer(address, request: bytes) -> tuple[int, str]:
    """Status and body. Whoever answers only after the rest of the request has come runs into the time limit."""
    with socket.create_connection(address, timeout=5) as connection:
        connection.sendall(request)
        said = b""
        while part := connection.recv(65536):
            said += part
    head, _, body = said.partition(b"\r\n\r\n")
    return int(head.split()[1]), body.decode()


JSON = "Content-Type: application/json"


@pytest.mark.parametrize("kind", [JSON, "content-type: Application/JSON; charset=utf-8"])
def test_a_whole_body_is_handed_on(address, kind):
    assert answer(address, asked(kind, "Content-Length: 100", body="x" * 100)) == (200, "100")


def test_a_sender_that_stops_gets_408(address):
    status, body = answer(address, asked(JSON, "Content-Length: 50", body="x"))
    assert status == 408 and "too_slow" in body


def test_a_body_is_refused_by_what_it_announces_before_it_comes(address):
    status, body = answer(address, asked(JSON, "Content-Length: 101"))
    assert status == 413 and "at most 100 bytes" in body


def test_a_body_without_a_length_is_counted(address):
    chunk = "40\r\n" + "x" * 64 + "\r\n"
    request = asked(JSON, "Transfer-Encoding: chunked", body=chunk * 2)
    assert answer(address, request)[0] == 413
    assert answer(address, asked(JSON, "Transfer-Encoding: chunked", body=chunk + "0\r\n\r\n")) == (200, "64")


def test_who_has_no_token_is_not_even_told_about_the_body(address):
    assert answer(address, asked("Content-Length: 5000", token="wrong"))[0] == 401
    assert answer(address, asked(method="GET", token="wrong"))[0] == 401


def test_silent_connections_do_not_keep_others_out(address):
    with ExitStack() as stack:
        for _ in range(50):
            stack.enter_context(socket.create_connection(address, timeout=5))
        assert answer(address, asked(method="GET")) == (200, "0")


def test_no_token_reaches_a_log(address, caplog):
    with caplog.at_level(logging.DEBUG):
        answer(address, asked(JSON, "Content-Length: 1", body="x"))
        _, body = answer(address, asked(token="another-secret-of-someone"))
    assert TOKEN not in caplog.text + body and "another-secret" not in caplog.text + body
