"""What the server's routes share: its settings, who may ask, how a request is read, and what is
counted.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace

from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request

from . import protocol as wire
from .engine import Engine
from .image_fetching import MIB, ImageLimits, picture_of

READERS = 4  # requests whose pictures are fetched and read at once
UPLOAD = 60.0  # seconds in which a request must have arrived


@dataclass(frozen=True)
class ServerConfig:
    """How the server answers: the model's name, what a request and a picture may be, and the token
    that is asked for, if any.
    """

    name: str
    bounds: wire.RequestLimits = field(default_factory=wire.RequestLimits)
    pictures: ImageLimits = field(default_factory=ImageLimits)
    max_request_bytes: int = 32 * MIB
    token: str | None = None


class APIError(Exception):
    """A request that is answered with an error: status, sentence, OpenAI's type and code."""

    def __init__(
        self,
        status: int,
        message: str,
        kind: str = "invalid_request_error",
        code: str | None = None,
    ):
        super().__init__(message)
        self.status, self.kind, self.code = status, kind, code


class ServerContext:
    """What the routes share: the engine, the settings, and what is counted."""

    def __init__(self, engine: Engine, settings: ServerConfig):
        self.engine, self.settings = engine, settings
        self.counts: Counter = Counter()
        self.began = time.time()
        self.in_flight = 0
        self.readers = asyncio.Semaphore(READERS)

    def check_token(self, request: Request) -> None:
        """Raise Refused unless the request brings the token."""
        if self.settings.token is None:
            return
        given = request.headers.get("authorization", "").encode()
        if not hmac.compare_digest(given, f"Bearer {self.settings.token}".encode()):
            raise APIError(
                401,
                "the bearer token is missing or wrong; give the server's as api_key",
                "authentication_error",
                "invalid_api_key",
            )

    @asynccontextmanager
    async def admit(self) -> AsyncIterator[None]:
        """A place among the requests that are read and answered at once, so that their bodies do
        not fill the memory.
        """
        most = self.engine.max_queue + self.engine.max_batch
        if self.in_flight >= most:
            raise busy(
                f"{self.in_flight} requests are under way, which is the limit; try again in a"
                " moment"
            )
        self.in_flight += 1
        try:
            yield
        finally:
            self.in_flight -= 1

    async def read(self, request: Request) -> object:
        """The JSON of a request; Refused where it is none, too large or too slow."""
        if "application/json" not in request.headers.get("content-type", ""):
            raise APIError(
                415, "the request must be JSON; send the header Content-Type: application/json"
            )
        limit, data = self.settings.max_request_bytes, bytearray()
        try:
            async with asyncio.timeout(UPLOAD):
                async for block in request.stream():
                    data += block
                    if len(data) > limit:
                        raise APIError(
                            413,
                            f"the request has more than {limit} bytes, this server's limit; send"
                            " smaller pictures",
                        )
        except ClientDisconnect:
            raise APIError(499, "the client left before its request had arrived") from None
        except TimeoutError:
            raise APIError(
                408, f"the request did not arrive within {UPLOAD:.0f} seconds; send it again"
            ) from None
        try:
            return json.loads(data)
        except (ValueError, RecursionError) as error:
            raise APIError(400, f"the request is not JSON: {error}") from None

    def prepare(self, body: object):
        """(request, question) of a request's JSON; ValueError or Refused for what cannot be
        asked.
        """
        engine, settings = self.engine, self.settings
        asked = wire.read_request(body, engine.processor.image_token, settings.bounds)
        if asked.model is not None and asked.model != settings.name:
            raise APIError(
                404,
                f"there is no model {asked.model!r} here; this server has {settings.name!r}",
                code="model_not_found",
            )
        shown = [engine.preprocess_image(picture_of(url, settings.pictures)) for url in asked.urls]
        more = {"num_answers": asked.num_answers, "off": asked.off}
        if asked.max_tokens is not None:
            return asked, engine.ask(asked.messages, shown, asked.sampled(0), **more)
        # Where a request names no length, what is left of the positions is enough; one token must
        # fit.
        question = engine.ask(asked.messages, shown, asked.sampled(1), **more)
        room, default = engine.room(question.num_tokens), settings.bounds.default_tokens
        sampling = asked.sampled(default if room is None else min(default, room))
        return asked, replace(question, sampling=sampling)

    async def prepared(self, body: object):
        """As `prepare`, in a thread of its own, and a ValueError refused."""
        try:
            async with self.readers:
                return await run_in_threadpool(self.prepare, body)
        except ValueError as error:
            raise APIError(400, str(error)) from None


def busy(message: str) -> APIError:
    """A request that finds no place."""
    return APIError(429, message, "rate_limit_error", "queue_full")


def model_entry(desk: ServerContext) -> dict:
    """The served model as OpenAI's clients read it."""
    return {
        "id": desk.settings.name,
        "object": "model",
        "created": int(desk.began),
        "owned_by": "sparsecut",
    }


def metrics_text(desk: ServerContext) -> str:
    """What was counted, in Prometheus' text format."""
    engine, counts = desk.engine, desk.counts
    rows = [
        ("requests_in_flight", "gauge", "requests being read or answered", desk.in_flight),
        ("queue_length", "gauge", "requests that wait", len(engine.waiting)),
        ("rows_running", "gauge", "answers being written", engine.num_running),
        (
            "prompt_tokens_total",
            "counter",
            "tokens read, pictures included",
            counts["prompt_tokens"],
        ),
        ("completion_tokens_total", "counter", "tokens written", counts["completion_tokens"]),
        ("batches_total", "counter", "batches generated", engine.counts["batches"]),
        ("batch_rows_total", "counter", "answers in them", engine.counts["rows"]),
        ("pictures_total", "counter", "pictures asked about", engine.counts["pictures"]),
        (
            "pictures_kept_total",
            "counter",
            "of them, those whose features were kept",
            engine.counts["pictures_kept"],
        ),
        ("kept_bytes", "gauge", "bytes of features kept", engine.kept.size),
        ("cancelled_total", "counter", "requests whose client left", engine.counts["cancelled"]),
        (
            "refused_total",
            "counter",
            "requests refused because the queue was full",
            engine.counts["refused"],
        ),
        ("failed_total", "counter", "requests that the model failed at", engine.counts["failed"]),
        ("uptime_seconds", "gauge", "seconds since the start", round(time.time() - desk.began, 1)),
    ]
    lines = []
    for name, kind, meaning, value in rows:
        lines += [
            f"# HELP sparsecut_{name} {meaning}",
            f"# TYPE sparsecut_{name} {kind}",
            f"sparsecut_{name} {value}",
        ]
    lines += [
        "# HELP sparsecut_responses_total responses by status",
        "# TYPE sparsecut_responses_total counter",
    ]
    statuses = sorted(status for status in counts if isinstance(status, int))
    lines += [
        f'sparsecut_responses_total{{status="{status}"}} {counts[status]}' for status in statuses
    ]
    return "\n".join(lines) + "\n"
