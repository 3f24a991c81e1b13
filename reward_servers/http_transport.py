"""How a request reaches servers that run on their own: HTTP, with a bearer token."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Any

import aiohttp
from pydantic import ValidationError

from reward_servers.contract import OverloadedError, RewardServerError
from reward_servers.http_images import LIMITS
from reward_servers.http_payloads import ANSWERS, ErrorAnswer, encode

_REQUEST_AT_FAULT = range(400, 500)
_FULL = (429, 503)
_TRY_AGAIN = (408,)
"""Of the 400s: nothing is wrong with the request itself."""


class HttpTransport:
    """One session to ``URL/SERVER/METHOD``. For one event loop; its deadline is the client's.

    Args:
        url: such as ``http://rewards:8000``.
        token: of the servers (``RL_REWARD_TOKEN``).
    """

    def __init__(self, url: str, token: str) -> None:
        self._url = url.rstrip("/")
        self._headers = {"Authorization": f"Bearer {token}"}
        self._session: aiohttp.ClientSession | None = None

    async def call(self, server: str, method: str, arguments: Mapping[str, Any]) -> Any:
        """As :meth:`reward_servers.transports.Transport.call`."""
        url = f"{self._url}/{server}/{method}"
        try:
            if method == "ready":
                response = self._opened().get(url)
            else:
                sent = await asyncio.to_thread(_body, arguments)
                response = self._opened().post(url, data=sent, headers={"Content-Type": "application/json"})
            async with response as answered:
                status, body = answered.status, await answered.read()
        except aiohttp.ClientError as error:
            raise RewardServerError(f"{url} cannot be reached: {type(error).__name__}: {error}") from error
        if status != 200:
            raise _failure(url, status, body)
        try:
            return await asyncio.to_thread(lambda: ANSWERS[method].model_validate_json(body).answer())
        except (ValidationError, ValueError) as error:
            raise RewardServerError(f"{url} gave no answer that can be read: {str(error).splitlines()[0]}") from None

    async def close(self) -> None:
        """Close the session."""
        if self._session is not None:
            await self._session.close()
            self._session = None

    def _opened(self) -> aiohttp.ClientSession:
        if self._session is None:  # a session belongs to the loop that runs
            timeout = aiohttp.ClientTimeout(total=None)
            self._session = aiohttp.ClientSession(headers=self._headers, timeout=timeout)
        return self._session


def _body(arguments: Mapping[str, Any]) -> bytes:
    """As JSON; made in a thread, for it takes long for large images. Raises ValueError for more than a server reads."""
    body = json.dumps(encode(dict(arguments))).encode()
    if len(body) > LIMITS.body_bytes:
        raise ValueError(f"a request of {len(body)} bytes is too large; a server reads at most {LIMITS.body_bytes}")
    return body


def _failure(url: str, status: int, body: bytes) -> Exception:
    """The error that a status stands for, with the server's own words where it has any."""
    try:
        said, ours = ErrorAnswer.model_validate_json(body).error.message, True
    except ValidationError:
        said, ours = body[:200].decode(errors="replace").strip(), False
    text = f"{url} answered {status}: {said}"
    if status in _FULL:
        return OverloadedError(text)
    # Serve's proxy answers 404 of its own for an application that is not there yet, or just being replaced.
    if status in _REQUEST_AT_FAULT and status not in _TRY_AGAIN and (ours or status != 404):
        return ValueError(text)
    return RewardServerError(text)
