"""How a request reaches a server inside the job: through Ray Serve handles. (HTTP: ``http_transport``.)"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import ray
from ray.serve.exceptions import BackPressureError

from reward_servers.contract import OverloadedError

_BY_REFERENCE = 64 * 1024
"""Bytes from which an image goes through the object store: by value it would be copied once more per request."""


class Transport(Protocol):
    """Carries one attempt of a request. A cancelled call tells the server, so that it need not go on."""

    async def call(self, server: str, method: str, arguments: Mapping[str, Any]) -> Any:
        """The contract object that ``method`` of ``server`` answers.

        Raises:
            ValueError: the request is at fault; sending it again cannot help.
            OverloadedError: the server's queue is full.
            Exception: anything else is the server's fault.
        """

    async def close(self) -> None:
        """Give connections back."""


class HandleTransport:
    """Deployment handles, by the server's name. Serve picks of two random replicas the one with fewer requests."""

    def __init__(self, handles: Mapping[str, Any]) -> None:
        self._handles = dict(handles)

    async def call(self, server: str, method: str, arguments: Mapping[str, Any]) -> Any:
        """As :meth:`Transport.call`; raises KeyError for a server without a handle."""
        sent = {name: _sendable(value) for name, value in arguments.items()}
        response = getattr(self._handles[server], method).remote(**sent)
        try:
            return await response
        except asyncio.CancelledError:
            response.cancel()
            raise
        except BackPressureError as error:
            raise OverloadedError(str(error)) from error

    async def close(self) -> None:
        """Handles need no closing."""


def _sendable(value: Any) -> Any:
    """Large images as references, inside lists too; the rest as it is."""
    if isinstance(value, list | tuple):
        return [_sendable(item) for item in value]
    return ray.put(value) if isinstance(value, np.ndarray) and value.nbytes >= _BY_REFERENCE else value
