"""The routes: OpenAI-compatible chat completions over HTTP, for one model."""

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
from ..schema import UserError
from . import responses
from .admission import APIError, ServerConfig, ServerContext, build_busy_error
from .conversation import build_conversation
from .decoding import TextDelta, join_deltas
from .engine import Engine, GenerationRequest, QueueFullError, RequestHandle
from .image_fetching import read_image
from .metrics import format_metrics
from .protocol import ChatCompletionRequest, parse_chat_request

POLL_SECONDS = 0.5  # between two looks whether the client is still there
NO_EVENT = object()  # sentinel: no event before the timeout


class ResponseCounter:
    """Middleware that counts responses by status."""

    def __init__(self, app, counts: Counter):
        self.app = app
        self.counts = counts

    async def __call__(self, scope, receive, send) -> None:
        async def count_and_send(message) -> None:
            if message["type"] == "http.response.start":
                self.counts[message["status"]] += 1
            await send(message)

        await self.app(scope, receive, count_and_send)


class EventStream(StreamingResponse):
    """The server-sent events of a request, which is cancelled unless they are read to their end."""

    def __init__(self, events: AsyncIterator[str], context: ServerContext, handle: RequestHandle):
        headers = {"Cache-Control": "no-cache"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self.context = context
        self.handle = handle

    async def __call__(self, scope, receive, send) -> None:
        self.context.num_in_flight += 1  # the place that the route held ended with the route
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.context.num_in_flight -= 1
            self.handle.cancel()


def make_app(engine: Engine, config: ServerConfig) -> FastAPI:
    """The web application: /v1/chat/completions, /v1/models, /health and /metrics.

    Args:
        engine: Answers the requests; its owner closes it.
        config: How the server answers.
    """
    app = FastAPI(
        title="SparseCut", version=__version__, docs_url=None, redoc_url=None, openapi_url=None
    )
    context = ServerContext(engine, config)
    app.state.context = context
    app.add_middleware(ResponseCounter, counts=context.counts)
    _add_error_handlers(app)
    _add_status_routes(app, context)
    _add_model_routes(app, context)

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        context.check_token(request)
        async with context.admit():
            body = await context.read_json(request)
            return await answer_chat(context, request, body)

    return app


def _add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(APIError)
    async def handle_api_error(request: Request, error: APIError) -> Response:
        headers = {"Retry-After": "1"} if error.status == 429 else None
        content = responses.build_error(str(error), error.kind, error.code)
        return JSONResponse(content, error.status, headers)

    @app.exception_handler(HTTPException)
    async def handle_http_error(request: Request, error: HTTPException) -> Response:
        message = (
            f"{request.method} {request.url.path}: {error.detail};"
            " this server has POST /v1/chat/completions, GET /v1/models"
        )
        return JSONResponse(responses.build_error(message), error.status_code, error.headers)

    @app.exception_handler(Exception)
    async def handle_failure(request: Request, error: Exception) -> Response:
        message = "the server failed at this request; see its log"
        return JSONResponse(responses.build_error(message, "server_error"), 500)


def _add_status_routes(app: FastAPI, context: ServerContext) -> None:
    engine = context.engine

    @app.get("/health")
    async def health() -> Response:
        if engine.thread.is_alive() and not engine.is_closed:
            return JSONResponse({"status": "ok"})
        return JSONResponse({"status": "closed"}, 503)

    @app.get("/metrics")
    async def metrics(request: Request) -> Response:
        context.check_token(request)
        return PlainTextResponse(format_metrics(context), media_type="text/plain; version=0.0.4")


def _add_model_routes(app: FastAPI, context: ServerContext) -> None:
    entry = {
        "id": context.config.name,
        "object": "model",
        "created": int(context.start_time),
        "owned_by": "sparsecut",
    }

    @app.get("/v1/models")
    async def list_models(request: Request) -> dict:
        context.check_token(request)
        return {"object": "list", "data": [entry]}

    @app.get("/v1/models/{name:path}")
    async def get_model(request: Request, name: str) -> dict:
        context.check_token(request)
        _check_model(name, context.config)
        return entry


def _check_model(name: str, config: ServerConfig) -> None:
    if name != config.name:
        raise APIError(
            404,
            f"there is no model {name!r} here; this server has {config.name!r}",
            code="model_not_found",
        )


async def answer_chat(context: ServerContext, request: Request, body: object) -> Response:
    """Answer a chat completion request, whole or as a stream of events.

    Args:
        context: The state that all routes use.
        request: The HTTP request, polled for whether the client is still there.
        body: Its JSON.

    Raises:
        APIError: For a request that cannot be answered.
    """
    engine = context.engine
    chat_request, generation = await context.run_reader(
        prepare_generation, engine, context.config, body
    )
    events: asyncio.Queue = asyncio.Queue()
    handle = _submit(engine, generation, events)
    header = responses.build_header(context.config.name, chat_request.stream)
    if chat_request.stream:
        stream = _stream_events(context, request, chat_request, handle, events, header)
        return EventStream(stream, context, handle)
    deltas = [delta async for delta in _receive_deltas(request, handle, events)]
    if handle.is_cancelled:
        return Response(status_code=499)  # nobody reads it
    answers = join_deltas(deltas, chat_request.n)
    usage = _count_usage(context, handle)
    return JSONResponse(responses.build_completion(header, answers, usage, chat_request.logprobs))


def prepare_generation(
    engine: Engine, config: ServerConfig, body: object
) -> tuple[ChatCompletionRequest, GenerationRequest]:
    """All that happens to a request before it is queued.

    Args:
        engine: Answers the request.
        config: How the server answers.
        body: The request's JSON.

    Returns:
        The checked request, and what the engine takes.

    Raises:
        UserError: For a request that cannot be answered.
        APIError: 404 for another model's name.
    """
    request = parse_chat_request(body, config.request_limits)
    if request.model is not None:
        _check_model(request.model, config)
    conversation = build_conversation(request.messages, engine.image_token, config.request_limits)
    images = [
        engine.prepare_image(read_image(url, config.image_limits))
        for url in conversation.image_urls
    ]
    generation = engine.prepare(
        conversation.messages,
        images,
        request.build_sampling(config.request_limits.default_tokens),
        num_answers=request.n,
        shortcuts_off=request.shortcuts_off,
        may_shorten=not request.has_length,
    )
    return request, generation


def _submit(engine: Engine, generation: GenerationRequest, events: asyncio.Queue) -> RequestHandle:
    """Put a request into the engine's queue; its deltas come into `events`."""
    loop = asyncio.get_running_loop()

    def on_delta(delta: TextDelta | Exception | None) -> None:
        if not loop.is_closed():  # else the server has ended before its engine
            loop.call_soon_threadsafe(events.put_nowait, delta)

    try:
        return engine.submit(generation, on_delta)
    except QueueFullError as error:
        raise build_busy_error(str(error)) from None


async def _receive_deltas(
    request: Request, handle: RequestHandle, events: asyncio.Queue
) -> AsyncIterator[TextDelta]:
    """What the engine sends, until its end or until the client leaves (then it is cancelled)."""
    last_look = time.monotonic()
    try:
        while True:
            event = await _next_event(events)
            if event is NO_EVENT or time.monotonic() - last_look > POLL_SECONDS:
                if await request.is_disconnected():
                    return
                last_look = time.monotonic()
            if event is NO_EVENT:
                continue
            if event is None:
                return
            if isinstance(event, Exception):
                raise _build_failure(event)
            yield event
    finally:
        handle.cancel()


async def _next_event(events: asyncio.Queue) -> object:
    try:
        return await asyncio.wait_for(events.get(), POLL_SECONDS)
    except TimeoutError:
        return NO_EVENT


def _build_failure(error: Exception) -> APIError:
    """The response to a request that failed in the engine."""
    if isinstance(error, QueueFullError):
        return APIError(503, str(error), "server_error")
    if isinstance(error, UserError):
        return APIError(400, str(error))
    return APIError(
        500, f"the model failed ({type(error).__name__}: {error}); try again", "server_error"
    )


async def _stream_events(
    context: ServerContext,
    request: Request,
    chat_request: ChatCompletionRequest,
    handle: RequestHandle,
    events: asyncio.Queue,
    header: dict,
) -> AsyncIterator[str]:
    """Server-sent events: per choice a first one with the role, then the text, usage, [DONE]."""
    wants_usage = chat_request.stream_options.include_usage
    no_usage_yet = {"usage": None} if wants_usage else {}
    for index in range(chat_request.n):
        chunk = responses.build_first_chunk(header, index)
        yield _format_event({**chunk, **no_usage_yet})
    try:
        async for delta in _receive_deltas(request, handle, events):
            chunk = responses.build_chunk(header, delta, chat_request.logprobs)
            yield _format_event({**chunk, **no_usage_yet})
    except APIError as error:
        yield _format_event(responses.build_error(str(error), error.kind, error.code))
        return
    usage = _count_usage(context, handle)
    if wants_usage:
        yield _format_event(responses.build_usage_chunk(header, usage))
    yield "data: [DONE]\n\n"


def _format_event(value: dict) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


def _count_usage(context: ServerContext, handle: RequestHandle) -> dict:
    prompt_tokens = handle.request.num_tokens
    completion_tokens = handle.num_generated
    context.count_tokens(prompt_tokens, completion_tokens)
    return responses.build_usage(prompt_tokens, completion_tokens)
