"""The routes: OpenAI-compatible chat completions over HTTP, for one model."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Mapping

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from .. import __version__
from ..schema import UserError
from . import responses
from .admission import ServerConfig, ServerContext, read_json
from .conversation import Conversation, build_conversation
from .decoding import TextDelta, join_deltas
from .engine import Engine, GenerationRequest, QueueFullError, RequestHandle
from .errors import APIError, build_busy_error
from .gate import Gate, HostNames, describe_failure, log_failure
from .image_fetching import read_medium
from .metrics import format_metrics
from .protocol import ChatCompletionRequest, parse_chat_request
from .uploads import Upload, get_address

READ_SECONDS = 60.0  # in which a client must read the next part of its answer
POLL_SECONDS = 0.5  # between two looks whether the client is still there
NO_EVENT = object()  # sentinel: no event before the timeout


class EventStream(StreamingResponse):
    """The server-sent events of a request, which is cancelled unless they are read to their end."""

    def __init__(
        self, events: AsyncIterator[str], context: ServerContext, request: Request, handle
    ):
        headers = {"Cache-Control": "no-cache"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self.context = context
        self.address = get_address(request)
        self.handle = handle

    async def __call__(self, scope, receive, send) -> None:
        async def send_in_time(message) -> None:
            try:
                async with asyncio.timeout(READ_SECONDS):
                    await send(message)
            except TimeoutError:
                raise OSError("the client does not read its answer") from None

        try:
            # The place that the route held ended with the route.
            with self.context.hold_place(self.address):
                await super().__call__(scope, receive, send_in_time)
        except ClientDisconnect:
            pass
        finally:
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
    host_names = HostNames(config.allowed_hosts)
    app.add_middleware(Gate, counts=context.counts, host_names=host_names)
    _add_error_handlers(app)
    _add_status_routes(app, context)
    _add_model_routes(app, context)

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        context.check_token(request)
        async with context.receive(request) as upload:
            return await answer_chat(context, request, upload)

    return app


def _add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(APIError)
    async def handle_api_error(request: Request, error: APIError) -> Response:
        headers = {"Retry-After": "1"} if error.status == 429 else None
        return JSONResponse(error.build_content(), error.status, headers)

    @app.exception_handler(HTTPException)
    async def handle_http_error(request: Request, error: HTTPException) -> Response:
        message = (
            f"{request.method} {request.url.path[:100]}: {error.detail};"
            " this server has POST /v1/chat/completions, GET /v1/models"
        )
        return JSONResponse(responses.build_error(message), error.status_code, error.headers)


def _add_status_routes(app: FastAPI, context: ServerContext) -> None:
    engine = context.engine

    @app.api_route("/health", methods=["GET", "HEAD"])
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
            param="model",
        )


async def answer_chat(context: ServerContext, request: Request, upload: Upload) -> Response:
    """Answer a chat completion request, whole or as a stream of events.

    Args:
        context: The state that all routes use.
        request: The HTTP request, polled for whether the client is still there.
        upload: Its body.

    Raises:
        APIError: For a request that cannot be answered.
    """
    engine = context.engine
    chat_request, generation = await _read_request(context, upload)
    events: asyncio.Queue = asyncio.Queue()
    handle = _submit(engine, generation, events)
    header = responses.build_header(context.config.name, chat_request.stream)
    if chat_request.stream:
        stream = _stream_events(context, request, chat_request, handle, events, header)
        return EventStream(stream, context, request, handle)
    deltas = [delta async for delta in _receive_deltas(request, handle, events)]
    if handle.is_cancelled:
        return Response(status_code=499)  # nobody reads it
    answers = join_deltas(deltas, chat_request.n)
    usage = _count_usage(context, handle)
    return JSONResponse(responses.build_completion(header, answers, usage, chat_request.logprobs))


async def _read_request(
    context: ServerContext, upload: Upload
) -> tuple[ChatCompletionRequest, GenerationRequest]:
    """The settings of a request, without its messages, and what the engine takes.

    So neither the body nor the images' files wait with the request.
    """
    engine = context.engine
    chat_request, conversation = await context.run_reader(
        check_request, engine, context.config, upload.data
    )
    fetched = await context.fetch_images(conversation.image_urls)
    generation = await context.run_reader(
        prepare_generation, engine, context.config, chat_request, conversation, fetched
    )
    context.uploads.release(upload)
    return chat_request.model_copy(update={"messages": []}), generation


def check_request(
    engine: Engine, config: ServerConfig, data: bytes | bytearray
) -> tuple[ChatCompletionRequest, Conversation]:
    """All that can be checked before a request's images are read.

    Args:
        engine: Answers the request.
        config: How the server answers.
        data: The request's JSON.

    Raises:
        UserError: For a request that cannot be answered.
        APIError: 404 for another model's name.
    """
    limits = config.request_limits
    request = parse_chat_request(read_json(data), limits)
    if request.model is not None:
        _check_model(request.model, config)
    conversation = build_conversation(
        request.messages, engine.image_token, limits, engine.reserved_tokens, engine.medium
    )
    return request, conversation


def prepare_generation(
    engine: Engine,
    config: ServerConfig,
    request: ChatCompletionRequest,
    conversation: Conversation,
    fetched: Mapping[str, bytes],
) -> GenerationRequest:
    """Read a request's images, and make what the engine takes.

    Args:
        engine: Answers the request.
        config: How the server answers.
        request: The checked request.
        conversation: Its messages.
        fetched: Bytes of its remote images by URL.

    Raises:
        UserError: For a request that cannot be answered.
    """
    images = [
        engine.prepare_image(read_medium(engine.medium, url, config.image_limits, fetched))
        for url in conversation.image_urls
    ]
    return engine.prepare(
        conversation.messages,
        images,
        request.build_sampling(config.request_limits.default_tokens),
        num_answers=request.n,
        shortcuts_off=request.shortcuts_off,
        template_arguments=request.chat_template_kwargs,
        may_shorten=not request.has_length,
    )


def _submit(engine: Engine, generation: GenerationRequest, events: asyncio.Queue) -> RequestHandle:
    """Put a request into the engine's queue; its deltas come into `events`."""
    loop = asyncio.get_running_loop()

    def on_delta(delta: TextDelta | Exception | None) -> None:
        if not loop.is_closed():  # else the server has ended before its engine
            loop.call_soon_threadsafe(events.put_nowait, delta)

    try:
        return engine.submit(generation, on_delta)
    except QueueFullError as error:
        if engine.is_closed:
            raise APIError(503, str(error), "server_error") from None
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
                raise _build_failure(event, request.state.request_id)
            yield event
    finally:
        handle.cancel()


async def _next_event(events: asyncio.Queue) -> object:
    try:
        return await asyncio.wait_for(events.get(), POLL_SECONDS)
    except TimeoutError:
        return NO_EVENT


def _build_failure(error: Exception, request_id: str) -> APIError:
    """The response to a request that failed in the engine."""
    if isinstance(error, QueueFullError):
        return APIError(503, str(error), "server_error")
    if isinstance(error, UserError):
        return APIError(400, str(error))
    log_failure(request_id, error)
    return APIError(500, describe_failure(request_id, error), "server_error")


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
        yield _format_event(error.build_content())
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
