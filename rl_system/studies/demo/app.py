"""The demo's page and its calls: a photograph comes in, events go out as they happen, files stay to be downloaded."""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import shutil
import threading
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, Response, StreamingResponse
from starlette.routing import Route

from rl_system.studies.demo.restoring import Event, Restorer, Tell
from rl_system.studies.restore.images import ImageRefused, Photograph, read_photograph, read_size
from rl_system.studies.web import RequestRefused, application, page_routes, read_body

LOG = logging.getLogger(__name__)
MOST_BYTES = 32 * 2**20
MOST_PIXELS = 64 * 10**6
MOST_OPEN = 8
"""Restorations that are under way or wait."""
_PAGE = Path(__file__).with_name("page")
_FILES = ("before.png", "restored.png")


def demo_app(restorer: Restorer, output: Path, local: bool) -> Starlette:
    """The application.

    ``POST /api/restorations?seed=N`` takes a photograph as ``application/octet-stream`` and answers a line of JSON for
    each event of :meth:`Restorer.restore`, with ``waiting`` and ``failed`` beside those;
    ``GET /api/restorations/ID/NAME`` is ``before.png`` or ``restored.png``.

    Args:
        restorer: works in one thread, one photograph after the other.
        output: folder of results, one folder each.
        local: see :func:`rl_system.studies.web.application`.
    """
    calls = _Calls(restorer, output)
    routes = [
        *page_routes(_PAGE, "demo"),
        Route("/api/restorations", calls.restore, methods=["POST"]),
        Route("/api/restorations/{key}/{name}", calls.result),
    ]
    return application(routes, {OSError: "a file cannot be read or written"}, local)


class _Gone(Exception):
    """The client no longer listens."""


class _Calls:
    def __init__(self, restorer: Restorer, output: Path) -> None:
        self._restorer = restorer
        self._output = output
        self._worker = ThreadPoolExecutor(1, "restorer")
        self._open = 0
        self._done: set[str] = set()

    async def restore(self, request: Request) -> Response:
        seed = request.query_params.get("seed", "0")
        if not (seed.isascii() and seed.isdecimal() and len(seed) < 10):
            raise RequestRefused(422, "invalid", "seed: a whole number from 0, of at most 9 digits")
        if self._open >= MOST_OPEN:
            raise RequestRefused(503, "busy", "others are waiting already; try again later")
        body = await read_body(request, ("application/octet-stream",), MOST_BYTES)
        key = secrets.token_hex(8)
        folder = self._output / key
        photograph = await asyncio.to_thread(_received, body, folder)
        return StreamingResponse(self._events(key, photograph, int(seed)), media_type="application/x-ndjson")

    async def result(self, request: Request) -> Response:
        key, name = request.path_params["key"], request.path_params["name"]
        if key not in self._done or name not in _FILES:
            raise RequestRefused(404, "no_result", "there is no such result")
        return FileResponse(self._output / key / name)

    async def _events(self, key: str, photograph: Photograph, seed: int) -> AsyncIterator[bytes]:
        """One line per event; when the client goes the restoration ends with its next event."""
        loop, gone = asyncio.get_running_loop(), threading.Event()
        events: asyncio.Queue[Event] = asyncio.Queue()

        def tell(event: Event) -> None:
            if gone.is_set():
                raise _Gone
            loop.call_soon_threadsafe(events.put_nowait, event)

        self._open += 1
        self._worker.submit(self._work, key, photograph, seed, tell)
        try:
            if self._open > 1:
                yield _line({"type": "waiting", "before": self._open - 1})
            event: Event = {}
            while event.get("type") not in ("done", "failed"):
                event = await events.get()
                if event["type"] == "done":
                    self._done.add(key)
                yield _line({**event, "id": key})
        finally:
            gone.set()
            self._open -= 1

    def _work(self, key: str, photograph: Photograph, seed: int, tell: Tell) -> None:
        folder, message = self._output / key, ""
        try:
            self._restorer.restore(photograph, seed, folder, tell)
            return
        except _Gone:
            LOG.info("%s: nobody listens any more", key)
        except ImageRefused as error:
            message = f"The photograph {error}."
        except Exception as error:  # the next photograph may do better
            LOG.exception("a restoration failed")
            message = f"{type(error).__name__}: {error}"
        shutil.rmtree(folder)
        with suppress(_Gone):
            tell({"type": "failed", "message": message})


def _received(body: bytes, folder: Path) -> Photograph:
    """The photograph that was sent; of the file nothing else is kept.

    Raises:
        RequestRefused: 422 it is none, or has too many pixels.
    """
    folder.mkdir(parents=True)
    path = folder / "upload"
    try:
        path.write_bytes(body)
        size = read_size(path)
        if size is not None and size[0] * size[1] > MOST_PIXELS:
            raise ImageRefused(f"has more than {MOST_PIXELS:,} pixels")
        photograph = read_photograph(path)
        path.unlink()
        return photograph
    except ImageRefused as error:
        shutil.rmtree(folder)
        raise RequestRefused(422, "not_restorable", f"this file {error}") from error


def _line(event: Event) -> bytes:
    return json.dumps(event, ensure_ascii=False).encode() + b"\n"
