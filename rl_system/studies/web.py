"""Pages that this machine serves: typed errors, bounded bodies, nothing that a browser would fetch from elsewhere."""

from __future__ import annotations

import json
import logging
import signal
import socket
from collections.abc import Callable, Mapping, Sequence
from http import HTTPStatus
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LOG = logging.getLogger(__name__)
_HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


class RequestRefused(Exception):
    """The client's fault: HTTP status, kind (a word for programs) and message (a sentence for people)."""

    def __init__(self, status: int, kind: str, message: str) -> None:
        super().__init__(message)
        self.status, self.kind = status, kind


def application(routes: Sequence[BaseRoute], unavailable: Mapping[type[Exception], str], local: bool) -> Starlette:
    """An application whose every error is ``{"error": {"type": ..., "message": ...}}``.

    Args:
        routes: of pages and calls.
        unavailable: exception -> message of the 503 that it becomes.
        local: refuse requests whose Host is no name of this machine's loopback (DNS rebinding).
    """

    async def not_available(request: Request, error: Exception) -> JSONResponse:
        LOG.error("%s failed", request.url.path, exc_info=error)
        message = next(text for kind, text in unavailable.items() if isinstance(error, kind))
        return error_answer(503, "unavailable", message)

    handlers: dict[Any, Any] = {RequestRefused: _refused, HTTPException: _http_error, Exception: _internal}
    handlers |= dict.fromkeys(unavailable, not_available)
    return Starlette(routes=routes, middleware=[Middleware(_Fence, local=local)], exception_handlers=handlers)


def error_answer(status: int, kind: str, message: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """The one form of an error."""
    return JSONResponse({"error": {"type": kind, "message": message}}, status, headers)


def page_routes(folder: Path, page: str) -> list[BaseRoute]:
    """Routes of a page: ``PAGE.html`` of ``folder`` at the root, ``PAGE.js`` and ``PAGE.css`` beside it."""

    def route(path: str, name: str) -> Route:
        async def answer(request: Request) -> FileResponse:
            return FileResponse(folder / name)

        return Route(path, answer)

    return [route("/", f"{page}.html"), *(route(f"/{page}.{kind}", f"{page}.{kind}") for kind in ("js", "css"))]


async def read_body(request: Request, content_types: Sequence[str], limit: int) -> bytes:
    """The body of a request, at most ``limit`` bytes of one of ``content_types``.

    A page of another origin cannot send such a type unasked, as long as none is one of HTML's forms.

    Raises:
        RequestRefused: 415 another type; 413 too large, without reading the rest.
    """
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind not in content_types:
        raise RequestRefused(415, "wrong_content_type", f"send {' or '.join(content_types)}")
    too_large = RequestRefused(413, "too_large", f"at most {limit} bytes")
    length = request.headers.get("content-length", "")
    if length.isdecimal() and (len(length) > 18 or int(length) > limit):
        raise too_large
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            raise too_large
    return bytes(body)


async def read_json(request: Request, limit: int = 1024) -> dict[str, Any]:
    """The JSON object that a request carries.

    Raises:
        RequestRefused: as :func:`read_body`; 422 no JSON object.
    """
    body = await read_body(request, ("application/json",), limit)
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise RequestRefused(422, "invalid", "the body is no JSON object")
    return value


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server on ``host``."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def serve(app: ASGIApp, host: str, port: int, announce: Callable[[str], None]) -> None:
    """Serve until SIGINT or SIGTERM; requests in progress end first.

    Args:
        app: what is served.
        host: address to listen on.
        port: 0 takes a free one.
        announce: called with the address once it accepts connections.

    Raises:
        OSError: the address cannot be listened on.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, port), family=family) as listener:
        shown = f"[{host}]" if ":" in host else host
        config = uvicorn.Config(app, log_level="warning", server_header=False, timeout_graceful_shutdown=5)
        server = uvicorn.Server(config)
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # uvicorn raises it again once it has shut down
        announce(f"http://{shown}:{listener.getsockname()[1]}/")
        try:
            server.run(sockets=[listener])
        except KeyboardInterrupt:
            LOG.info("stopped by a signal")


class _Fence:
    """ASGI middleware: refuses foreign names of this machine, and adds the headers that keep a page to itself."""

    def __init__(self, app: ASGIApp, local: bool) -> None:
        self._app, self._local = app, local

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
                headers.setdefault("cache-control", "no-store")
            await send(message)

        if scope["type"] == "http" and self._local and not is_loopback(_host_name(scope)):
            refusal = error_answer(400, "wrong_host", "this server answers to localhost and 127.0.0.1 only")
            await refusal(scope, receive, with_headers)
            return
        await self._app(scope, receive, with_headers)


def _host_name(scope: Scope) -> str:
    host = next((value.decode("latin-1") for name, value in scope["headers"] if name == b"host"), "")
    return host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]


async def _refused(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestRefused)
    return error_answer(error.status, error.kind, str(error))


async def _http_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    kind = HTTPStatus(error.status_code).phrase.lower().replace(" ", "_")
    return error_answer(error.status_code, kind, str(error.detail), error.headers)


async def _internal(request: Request, error: Exception) -> JSONResponse:
    return error_answer(500, "internal", type(error).__name__)  # Starlette logs it
