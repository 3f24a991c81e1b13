"""HTTP routes of the reward servers, one FastAPI application per server, in front of a replica's methods."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from reward_servers import http_payloads as payloads
from reward_servers.client import GROUNDED_SAM, IQA, QWEN_VL
from reward_servers.contract import RewardServerError
from reward_servers.http_guard import Guard

log = logging.getLogger(__name__)

ROUTES: dict[str, dict[str, Any]] = {
    GROUNDED_SAM: {"objects": payloads.ObjectsRequest},
    QWEN_VL: {"judge": payloads.JudgeRequest, "caption": payloads.ImageRequest, "tag": payloads.ImageRequest},
    IQA: {"measure": payloads.MeasureRequest},
}
"""Server -> method -> model of its request; a method is POST /METHOD."""

_STATUS = {
    400: "bad_request: the request's content",
    401: "unauthorised: no or a wrong bearer token",
    404: "bad_request: no such route",
    405: "bad_request: another method",
    408: "too_slow: the body did not arrive in time",
    413: "too_large: more bytes than a request may have",
    415: "no_json: another content type",
    422: "invalid: the request's form",
    500: "internal: an unforeseen error; the server's log has it",
    502: "no_answer: the model gave none that can be used",
}


def replica() -> Any:
    """The replica of this process."""
    from ray import serve

    return serve.get_replica_context().servable_object


def routes(server: str, guarded: bool = True) -> FastAPI:
    """The application of one server.

    Args:
        server: a key of :data:`ROUTES`.
        guarded: behind a :class:`Guard`, which reads the token when the replica starts to serve.
    """
    errors: dict[int | str, dict[str, Any]] = {
        status: {"model": payloads.ErrorAnswer, "description": text} for status, text in _STATUS.items()
    }
    app = FastAPI(
        title=f"Reward server {server}", responses=errors, docs_url=None, redoc_url=None, redirect_slashes=False
    )
    for method, request in ROUTES[server].items():
        answer = payloads.ANSWERS[method]
        app.post(f"/{method}", response_model=answer)(_endpoint(method, request, answer))
    app.get("/ready", response_model=payloads.ReadyAnswer)(_ready)
    app.add_exception_handler(ValueError, _bad_request)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(RewardServerError, _no_answer)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _internal)
    if guarded:
        app.add_middleware(Guard)
    return app


def _endpoint(method: str, request_model: Any, answer_model: Any) -> Callable[..., Any]:
    async def endpoint(request: Any, server: Any) -> Any:
        arguments = await asyncio.to_thread(request.arguments)
        answer = await getattr(server, method)(**arguments)
        try:
            return answer_model.of(answer)
        except ValidationError as error:  # a ValueError, but the model's fault and not the request's
            raise RewardServerError(f"the answer to {method} cannot be sent: {_first(error.errors())}") from None

    # FastAPI reads these; with names from outside, `from __future__ import annotations` would hide them from it.
    endpoint.__annotations__ = {"request": request_model, "server": Annotated[Any, Depends(replica)]}
    endpoint.__name__ = method
    endpoint.__doc__ = request_model.__doc__
    return endpoint


async def _ready(server: Annotated[Any, Depends(replica)]) -> payloads.ReadyAnswer:
    """What a replica says of itself."""
    return payloads.ReadyAnswer.of(await server.ready())


async def _bad_request(request: Request, error: Exception) -> JSONResponse:
    return _error(400, "bad_request", str(error))


async def _invalid(request: Request, error: Exception) -> JSONResponse:
    """Where and what, never the content that was sent."""
    assert isinstance(error, RequestValidationError)
    return _error(422, "invalid", _first(error.errors(), skip=1))


def _first(errors: Sequence[Any], skip: int = 0) -> str:
    """The first error: where, and what is wrong, without the value."""
    where = ".".join(str(part) for part in errors[0]["loc"][skip:]) or "the body"
    return f"{where}: {errors[0]['msg']}"[:300]


async def _no_answer(request: Request, error: Exception) -> JSONResponse:
    return _error(502, "no_answer", str(error))


async def _http_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    return _error(error.status_code, "bad_request", str(error.detail), error.headers)  # 405 says what is allowed


async def _internal(request: Request, error: Exception) -> JSONResponse:
    log.error("%s failed", request.url.path, exc_info=error)
    return _error(500, "internal", type(error).__name__)


def _error(status: int, kind: str, message: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    return JSONResponse({"error": {"type": kind, "message": message}}, status, headers)
