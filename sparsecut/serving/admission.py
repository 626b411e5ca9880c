"""The common base of the routes: the server's settings, authorization, and receiving a request."""

from __future__ import annotations

import asyncio
import hmac
import json
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request

from ..schema import UserError
from .engine import Engine
from .image_fetching import MIB, ImageLimits
from .protocol import RequestLimits

MAX_READERS = 4  # requests whose images are fetched and read at once
UPLOAD_SECONDS = 60.0  # time in which a request must have arrived


@dataclass(frozen=True)
class ServerConfig:
    """How the server answers.

    Attributes:
        name: The model's name in requests.
        request_limits: What one request may ask for.
        image_limits: What one image may be.
        max_request_bytes: Bytes of one request.
        token: What clients must give as api_key; None lets everybody in.
    """

    name: str
    request_limits: RequestLimits = field(default_factory=RequestLimits)
    image_limits: ImageLimits = field(default_factory=ImageLimits)
    max_request_bytes: int = 32 * MIB
    token: str | None = None


class APIError(Exception):
    """A request that is answered with an error.

    Attributes:
        status: The HTTP status.
        kind: OpenAI's type of the error.
        code: OpenAI's code of the error.
    """

    def __init__(
        self,
        status: int,
        message: str,
        kind: str = "invalid_request_error",
        code: str | None = None,
    ):
        super().__init__(message)
        self.status = status
        self.kind = kind
        self.code = code


def build_busy_error(message: str) -> APIError:
    """The error for a request that finds no place."""
    return APIError(429, message, "rate_limit_error", "queue_full")


class ServerContext:
    """The state that all routes use.

    Attributes:
        engine: The model.
        config: How the server answers.
        counts: Responses by status, "prompt_tokens" and "completion_tokens".
        start_time: When the server started, in seconds since 1970.
        num_in_flight: Requests that are being read or answered.
    """

    def __init__(self, engine: Engine, config: ServerConfig):
        self.engine = engine
        self.config = config
        self.counts: Counter = Counter()
        self.start_time = time.time()
        self.num_in_flight = 0
        self.readers = asyncio.Semaphore(MAX_READERS)

    def check_token(self, request: Request) -> None:
        """Compare the request's bearer token with the server's.

        Raises:
            APIError: 401 where the token is missing or wrong.
        """
        if self.config.token is None:
            return
        header = request.headers.get("authorization", "").encode()
        if not hmac.compare_digest(header, f"Bearer {self.config.token}".encode()):
            raise APIError(
                401,
                "the bearer token is missing or wrong; give the server's token as api_key",
                "authentication_error",
                "invalid_api_key",
            )

    @asynccontextmanager
    async def admit(self) -> AsyncIterator[None]:
        """Hold a place among the requests under way, so that their bodies do not fill the memory.

        Raises:
            APIError: 429 where all places are taken.
        """
        limit = self.engine.max_queue + self.engine.max_batch
        if self.num_in_flight >= limit:
            raise build_busy_error(
                f"{self.num_in_flight} requests are under way, which is the limit;"
                " try again in a moment"
            )
        self.num_in_flight += 1
        try:
            yield
        finally:
            self.num_in_flight -= 1

    async def read_json(self, request: Request) -> object:
        """Receive the JSON of a request.

        Raises:
            APIError: Where it is no JSON (400, 415), too large (413) or too slow (408), and where
                the client leaves (499).
        """
        if "application/json" not in request.headers.get("content-type", ""):
            raise APIError(
                415, "the request must be JSON; send the header Content-Type: application/json"
            )
        try:
            async with asyncio.timeout(UPLOAD_SECONDS):
                data = await self._read_body(request)
        except ClientDisconnect:
            raise APIError(499, "the client left before its request had arrived") from None
        except TimeoutError:
            raise APIError(
                408,
                f"the request did not arrive within {UPLOAD_SECONDS:.0f} seconds; send it again",
            ) from None
        try:
            return json.loads(data)
        except (ValueError, RecursionError) as error:
            raise APIError(400, f"the request is not JSON: {error}") from None

    async def _read_body(self, request: Request) -> bytearray:
        limit = self.config.max_request_bytes
        data = bytearray()
        async for block in request.stream():
            data += block
            if len(data) > limit:
                raise APIError(
                    413,
                    f"the request has more than {limit} bytes, this server's limit;"
                    " send smaller images",
                )
        return data

    async def run_reader(self, function: Callable, *arguments):
        """Call a function in a thread of its own, a few at once.

        Raises:
            APIError: 400 where the function raises a UserError.
        """
        try:
            async with self.readers:
                return await run_in_threadpool(function, *arguments)
        except UserError as error:
            raise APIError(400, str(error)) from None

    def count_tokens(self, prompt_tokens: int, completion_tokens: int) -> None:
        """Count the tokens of an answered request."""
        self.counts["prompt_tokens"] += prompt_tokens
        self.counts["completion_tokens"] += completion_tokens
