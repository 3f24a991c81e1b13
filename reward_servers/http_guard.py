"""What stands before the HTTP routes: bearer token, size and patience. Plain ASGI: nothing is read before it may."""

from __future__ import annotations

import asyncio
import hmac
import json
import os
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, TypeAlias

from reward_servers.http_images import LIMITS, Limits

TOKEN_VARIABLE = "RL_REWARD_TOKEN"
"""Environment variable of servers and clients that holds the bearer token."""
SHORTEST_TOKEN = 16

Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
App: TypeAlias = Callable[[Message, Receive, Send], Awaitable[None]]


def token_of_environment() -> str:
    """The token. Raises ValueError if it is missing or too short to be one; it is never part of a message."""
    token = os.environ.get(TOKEN_VARIABLE, "")
    if len(token) < SHORTEST_TOKEN or not token.isascii() or not token.isprintable() or " " in token:
        raise ValueError(
            f"reward servers need a token in {TOKEN_VARIABLE}: at least {SHORTEST_TOKEN} printable ASCII characters "
            "without spaces, such as `openssl rand -hex 32` prints"
        )
    return token


class Guard:
    """ASGI middleware. The token is read from the environment of the process that serves.

    Args:
        app: what is guarded.
        limits: of a request's body.

    Raises:
        ValueError: there is no token.
    """

    def __init__(self, app: App, limits: Limits = LIMITS) -> None:
        self._app = app
        self._limits = limits
        self._expected = f"Bearer {token_of_environment()}".encode()

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer an error, or hand on a request whose body has come whole."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.lower(): value for name, value in scope["headers"]}
        if not hmac.compare_digest(headers.get(b"authorization", b""), self._expected):
            await _refuse(send, 401, "unauthorised", "the bearer token is missing or wrong")
            return
        if scope["method"] in ("GET", "HEAD", "OPTIONS"):
            await self._app(scope, receive, send)
            return
        if headers.get(b"content-type", b"").split(b";")[0].strip().lower() != b"application/json":
            await _refuse(send, 415, "no_json", "send application/json")
            return
        length = headers.get(b"content-length", b"")
        if length.isdigit() and int(length) > self._limits.body_bytes:
            await self._too_large(send)
            return
        try:
            body = await asyncio.wait_for(self._body(receive), self._limits.body_s)
        except TimeoutError:
            await _refuse(send, 408, "too_slow", f"the request's body took more than {self._limits.body_s:g} s")
            return
        except _TooLarge:
            await self._too_large(send)
            return
        if body is not None:  # else the client has gone
            await self._app(scope, _replayed(body, receive), send)

    async def _body(self, receive: Receive) -> bytes | None:
        chunks, size = [], 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            chunk = message.get("body", b"")
            size += len(chunk)
            if size > self._limits.body_bytes:
                raise _TooLarge
            chunks.append(chunk)
            if not message.get("more_body", False):
                return b"".join(chunks)

    async def _too_large(self, send: Send) -> None:
        await _refuse(send, 413, "too_large", f"a request has at most {self._limits.body_bytes} bytes")


class _TooLarge(Exception):
    pass


def _replayed(body: bytes, receive: Receive) -> Receive:
    """``receive`` of a request whose body has been read."""
    given = False

    async def again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


async def _refuse(send: Send, status: int, kind: str, message: str) -> None:
    body = json.dumps({"error": {"type": kind, "message": message}}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers += [(b"connection", b"close")] + ([(b"www-authenticate", b"Bearer")] if status == 401 else [])
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
