"""The server: OpenAI-compatible chat completions over HTTP, for one model."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import AsyncIterator

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from .. import __version__
from . import protocol as wire
from .context import APIError, ServerConfig, ServerContext, busy, metrics_text, model_entry
from .decoding import TextDelta, joined
from .engine import Engine, QueueFullError, RequestHandle

POLL = 0.5  # seconds between two looks whether the client is still there
NOTHING = object()  # has been told since


class Counting:
    """Counts responses by status on their way out."""

    def __init__(self, app, counts: Counter):
        self.app, self.counts = app, counts

    async def __call__(self, scope, receive, send) -> None:
        async def counted(message) -> None:
            if message["type"] == "http.response.start":
                self.counts[message["status"]] += 1
            await send(message)

        await self.app(scope, receive, counted)


class EventStream(StreamingResponse):
    """Server-sent events of one job, which is cancelled where they are not read to their end."""

    def __init__(self, content, desk: ServerContext, job: RequestHandle):
        super().__init__(
            content, media_type="text/event-stream", headers={"Cache-Control": "no-cache"}
        )
        self.desk, self.job = desk, job

    async def __call__(self, scope, receive, send) -> None:
        self.desk.in_flight += 1  # the seat that its route had ended with the route
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.desk.in_flight -= 1
            self.job.cancel()


def make_app(engine: Engine, settings: ServerConfig) -> FastAPI:
    """The web application: /v1/chat/completions, /v1/models, /health and /metrics; the engine is
    closed by its owner.
    """
    app = FastAPI(
        title="SparseCut", version=__version__, docs_url=None, redoc_url=None, openapi_url=None
    )
    desk = ServerContext(engine, settings)
    app.state.desk = desk

    app.add_middleware(Counting, counts=desk.counts)

    @app.exception_handler(APIError)
    async def refused(request: Request, error: APIError) -> Response:
        headers = {"Retry-After": "1"} if error.status == 429 else None
        return JSONResponse(wire.failure(str(error), error.kind, error.code), error.status, headers)

    @app.exception_handler(HTTPException)
    async def not_there(request: Request, error: HTTPException) -> Response:
        message = (
            f"{request.method} {request.url.path}: {error.detail}; this server has POST"
            " /v1/chat/completions, GET /v1/models"
        )
        return JSONResponse(wire.failure(message), error.status_code, error.headers)

    @app.exception_handler(Exception)
    async def broken(request: Request, error: Exception) -> Response:
        return JSONResponse(
            wire.failure("the server failed at this request; its log says why", "server_error"), 500
        )

    @app.get("/health")
    async def health() -> Response:
        alive = engine.thread.is_alive() and not engine.closed
        return JSONResponse({"status": "ok" if alive else "closed"}, 200 if alive else 503)

    @app.get("/v1/models")
    async def models(request: Request) -> dict:
        desk.check_token(request)
        return {"object": "list", "data": [model_entry(desk)]}

    @app.get("/v1/models/{name:path}")
    async def model(request: Request, name: str) -> dict:
        desk.check_token(request)
        if name != settings.name:
            raise APIError(
                404,
                f"there is no model {name!r} here; this server has {settings.name!r}",
                code="model_not_found",
            )
        return model_entry(desk)

    @app.get("/metrics")
    async def metrics(request: Request) -> Response:
        desk.check_token(request)
        return PlainTextResponse(metrics_text(desk), media_type="text/plain; version=0.0.4")

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        desk.check_token(request)
        async with desk.admit():
            asked, question = await desk.prepared(await desk.read(request))
            events: asyncio.Queue = asyncio.Queue()
            job = _submit(engine, question, events)
            if asked.stream:
                heading = wire.new_heading(settings.name, stream=True)
                return EventStream(_stream(desk, request, asked, job, events, heading), desk, job)
            pieces = [piece async for piece in _pieces(request, job, events)]
        if job.cancelled:
            return Response(status_code=499)  # nobody reads it
        usage = _usage(desk, job)
        answers = joined(pieces, asked.num_answers)
        heading = wire.new_heading(settings.name, stream=False)
        return JSONResponse(
            wire.completion(heading, answers, usage, asked.sampling["top_logprobs"] is not None)
        )

    return app


def _submit(engine: Engine, question, events: asyncio.Queue) -> RequestHandle:
    loop = asyncio.get_running_loop()

    def on_delta(piece) -> None:
        if not loop.is_closed():  # else the server has ended before its engine
            loop.call_soon_threadsafe(events.put_nowait, piece)

    try:
        return engine.submit(question, on_delta)
    except QueueFullError as error:
        raise busy(str(error)) from None


async def _pieces(
    request: Request, job: RequestHandle, events: asyncio.Queue
) -> AsyncIterator[TextDelta]:
    """What the engine tells, until its end or until the client leaves, which cancels the job."""
    looked = time.monotonic()
    try:
        while True:
            try:
                piece = await asyncio.wait_for(events.get(), POLL)
            except TimeoutError:
                piece = NOTHING
            if time.monotonic() - looked > POLL or piece is NOTHING:
                if await request.is_disconnected():
                    return
                looked = time.monotonic()
            if piece is None:
                return
            if isinstance(piece, Exception):
                raise _broken(piece)
            if piece is not NOTHING:
                yield piece
    finally:
        job.cancel()


def _broken(error: Exception) -> APIError:
    if isinstance(error, QueueFullError):
        return APIError(503, str(error), "server_error")
    if isinstance(error, ValueError):
        return APIError(400, str(error))
    return APIError(
        500, f"the model failed ({type(error).__name__}: {error}); try again", "server_error"
    )


async def _stream(
    desk: ServerContext,
    request: Request,
    asked,
    job: RequestHandle,
    events: asyncio.Queue,
    heading: dict,
) -> AsyncIterator[str]:
    """Server-sent events: a first one per choice with the role, one per piece, usage where it is
    wanted, and [DONE].
    """
    with_logprobs = asked.sampling["top_logprobs"] is not None
    more = {"usage": None} if asked.usage else {}
    for i in range(asked.num_answers):
        choice = {
            "index": i,
            "delta": {"role": "assistant", "content": ""},
            "logprobs": None,
            "finish_reason": None,
        }
        yield _event({**heading, "choices": [choice], **more})
    try:
        async for piece in _pieces(request, job, events):
            yield _event({**wire.chunk(heading, piece, with_logprobs), **more})
    except APIError as error:
        yield _event(wire.failure(str(error), error.kind, error.code))
        return
    usage = _usage(desk, job)
    if asked.usage:
        yield _event({**heading, "choices": [], "usage": usage})
    yield "data: [DONE]\n\n"


def _event(value: dict) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


def _usage(desk: ServerContext, job: RequestHandle) -> dict:
    desk.counts["prompt_tokens"] += job.question.num_tokens
    desk.counts["completion_tokens"] += job.num_generated
    return wire.usage_of(job.question.num_tokens, job.num_generated)
