"""The web application of `understudy serve`: routes, the bearer token, and requests that are scored together.

While one forward runs, further requests wait; the next one scores all that have come meanwhile. So no request is held
back for others, and a busy server works in large batches.
"""

import asyncio
import hmac
import logging
from collections.abc import Awaitable, Callable
from typing import Any

from pydantic import BaseModel, ValidationError
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from . import wire
from .scoring import Scorer

logger = logging.getLogger(__name__)
_BINARY = "application/octet-stream"


class _Work:
    """Runs the scorer in a thread, one call at a time, for all requests that wait."""

    def __init__(self, scorer: Scorer) -> None:
        self.scorer = scorer
        self._waiting: list[tuple[wire.ScoreRequest, asyncio.Future[bytes]]] = []
        self._model = asyncio.Lock()

    async def score(self, request: wire.ScoreRequest) -> bytes:
        future: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._waiting.append((request, future))
        async with self._model:
            if not future.done():  # else it was scored with the request before it
                waiting, self._waiting = self._waiting, []
                await self._score(waiting)
        return await future

    async def _score(self, waiting: list[tuple[wire.ScoreRequest, "asyncio.Future[bytes]"]]) -> None:
        try:
            replies = await asyncio.to_thread(self.scorer.score, [request for request, _ in waiting])
        except Exception as error:
            for _, future in waiting:
                if not future.done():
                    future.set_exception(error)
            return
        for (_, future), reply in zip(waiting, replies, strict=True):
            if not future.done():  # else the client has gone
                future.set_result(reply)

    async def generate(self, request: wire.GenerateRequest) -> wire.GenerateReply:
        async with self._model:
            return await asyncio.to_thread(self.scorer.generate, request)


class _RequireToken:
    """ASGI middleware that answers 401 without the token, except to /health."""

    def __init__(self, app: Any, token: str) -> None:
        self.app, self.expected = app, f"Bearer {token}".encode()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and scope["path"] != "/health":
            given = dict(scope["headers"]).get(b"authorization", b"")
            if not hmac.compare_digest(given, self.expected):
                return await _error(401, "a bearer token is missing, or it is another one")(scope, receive, send)
        return await self.app(scope, receive, send)


def application(scorer: Scorer, token: str | None = None) -> Starlette:
    """The web application; with a `token` only for those who send it."""
    work, headers = _Work(scorer), {wire.FINGERPRINT: scorer.info.fingerprint}

    async def health(request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def info(request: Request) -> Response:
        return JSONResponse(scorer.info.model_dump())

    async def head(request: Request) -> Response:
        if scorer.head is None:
            return _error(404, "this model's head cannot be sent")
        return Response(await asyncio.to_thread(scorer.packed_head), media_type=_BINARY, headers=headers)

    async def score(message: wire.ScoreRequest) -> Response:
        if reason := scorer.refusal(message):
            return _error(400, reason)
        return Response(await work.score(message), media_type=_BINARY, headers=headers)

    async def generate(message: wire.GenerateRequest) -> Response:
        if reason := scorer.refused_prompts(message):
            return _error(400, reason)
        try:
            return JSONResponse((await work.generate(message)).model_dump(), headers=headers)
        except ValueError as error:
            return _error(400, str(error))

    routes = [
        Route("/health", health),
        Route("/info", info),
        Route("/head", head),
        Route("/score", _reading(wire.ScoreRequest, score), methods=["POST"]),
        Route("/generate", _reading(wire.GenerateRequest, generate), methods=["POST"]),
    ]
    middleware = [] if token is None else [Middleware(_RequireToken, token=token)]
    return Starlette(routes=routes, middleware=middleware)


def _reading(
    kind: type[BaseModel], answer: Callable[[Any], Awaitable[Response]]
) -> Callable[[Request], Awaitable[Response]]:
    """An endpoint that reads a message of one kind and answers it; an error in the model is a reply with its reason."""

    async def endpoint(request: Request) -> Response:
        try:
            message = kind.model_validate_json(await request.body())
        except ValidationError as error:
            first = error.errors()[0]
            return _error(400, f"{'.'.join(map(str, first['loc']))}: {first['msg']}")
        try:
            return await answer(message)
        except Exception as error:  # models raise anything
            logger.warning("a request failed", exc_info=error)
            return _error(500, str(error).partition("\n")[0] or type(error).__name__)

    return endpoint


def _error(status: int, reason: str) -> Response:
    return JSONResponse({"error": reason}, status_code=status)
