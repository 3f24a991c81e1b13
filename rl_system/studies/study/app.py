"""The study's page and its calls. No answer names a method: pictures have numbers, in the participant's own order."""

from __future__ import annotations

import asyncio
import sqlite3
from functools import lru_cache
from pathlib import Path

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from rl_system.studies.evaluate.images import EvaluationRefused
from rl_system.studies.study.material import Material, order_for, plain_png
from rl_system.studies.study.votes import VoteBook
from rl_system.studies.web import RequestRefused, application, page_routes, read_json

_PAGE = Path(__file__).with_name("page")
_ONE = "/api/participants/{code}"
_UNAVAILABLE = {
    sqlite3.Error: "the votes cannot be read or written just now; try again",
    EvaluationRefused: "the picture cannot be read any more; tell who runs the study",
}


def study_app(material: Material, book: VoteBook, local: bool) -> Starlette:
    """The application.

    Calls, all under ``/api/participants``; images and pictures are numbered from 1 in the participant's own order:
    ``POST`` a new participant; ``GET /CODE`` how far they are; ``PUT`` and ``DELETE /CODE/votes/IMAGE`` with
    ``{"picture": N}``; ``GET /CODE/images/IMAGE/PICTURE`` a PNG, picture 0 the photograph itself.

    Args:
        material: what is compared.
        book: where votes go; used from the event loop only.
        local: see :func:`rl_system.studies.web.application`.
    """
    calls = _Calls(material, book)
    routes = [
        *page_routes(_PAGE, "study"),
        Route("/api/participants", calls.join, methods=["POST"]),
        Route(_ONE, calls.progress),
        Route(f"{_ONE}/votes/{{image}}", calls.vote, methods=["PUT"]),
        Route(f"{_ONE}/votes/{{image}}", calls.take_back, methods=["DELETE"]),
        Route(f"{_ONE}/images/{{image}}/{{picture}}", calls.picture),
    ]
    return application(routes, _UNAVAILABLE, local)


class _Calls:
    def __init__(self, material: Material, book: VoteBook) -> None:
        self._material = material
        self._book = book
        self._order = lru_cache(maxsize=256)(
            lambda code: order_for(code, book.seed, len(material.items), len(material.methods))
        )

    async def join(self, request: Request) -> Response:
        await read_json(request)
        return JSONResponse({"code": self._book.new_participant()}, 201)

    async def progress(self, request: Request) -> Response:
        code = self._participant(request)
        places = {item: (image, methods) for image, (item, methods) in enumerate(self._order(code), start=1)}
        votes = [(*places[item], method) for item, method in self._book.votes(code)]
        answer = {
            "images": len(self._material.items),
            "pictures": len(self._material.methods),
            "votes": [{"image": image, "picture": methods.index(m) + 1} for image, methods, m in votes],
        }
        return JSONResponse(answer)

    async def vote(self, request: Request) -> Response:
        code, (item, methods) = self._participant(request), self._shown(request)
        body = await read_json(request)
        picture = body.get("picture")
        if type(picture) is not int or not 1 <= picture <= len(methods):
            raise RequestRefused(422, "invalid", f"picture: a whole number from 1 to {len(methods)}")
        self._book.cast(code, item, methods[picture - 1])
        return JSONResponse({"image": _number(request, "image"), "picture": picture})

    async def take_back(self, request: Request) -> Response:
        code, (item, _) = self._participant(request), self._shown(request)
        if not self._book.take_back(code, item):
            raise RequestRefused(404, "no_vote", "there is no vote on this image")
        return Response(status_code=204)

    async def picture(self, request: Request) -> Response:
        self._participant(request)
        item, methods = self._shown(request)
        picture = _number(request, "picture")
        if not 0 <= picture <= len(methods):
            raise RequestRefused(404, "no_picture", "there is no such picture")
        files = self._material.items[item]
        path = files.results[methods[picture - 1]] if picture else files.photograph
        # The browser may keep it: the numbers mean the same for this participant as long as the study lives.
        headers = {"cache-control": "private, max-age=86400"}
        return Response(await asyncio.to_thread(plain_png, path), headers=headers, media_type="image/png")

    def _participant(self, request: Request) -> str:
        code: str = request.path_params["code"]
        if not self._book.is_participant(code):
            raise RequestRefused(404, "no_participant", "there is no participant of this code")
        return code

    def _shown(self, request: Request) -> tuple[int, tuple[int, ...]]:
        """Item and order of methods of the image that the path names; the participant has been checked."""
        image = _number(request, "image")
        if not 1 <= image <= len(self._material.items):
            raise RequestRefused(404, "no_image", "there is no such image")
        return self._order(request.path_params["code"])[image - 1]


def _number(request: Request, name: str) -> int:
    """A number of the path; -1, which nothing has, if it is none or longer than any."""
    text: str = request.path_params[name]
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 10 else -1
