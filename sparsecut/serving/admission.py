"""The common base of the routes: the server's settings, authorization, and receiving a request."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import json
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request

from ..schema import UserError
from .engine import Engine
from .errors import APIError, build_busy_error
from .image_fetching import MIB, ImageLimits, fetch_all, is_remote
from .protocol import RequestLimits, SettingError
from .uploads import Upload, Uploads, get_address

MAX_READERS = 4  # requests whose images are fetched and read at once
MAX_FETCHERS = 8  # requests whose remote images are fetched at once
MAX_FETCHING = 16  # requests that fetch or wait for that; more would take everybody's places
MAX_MARKS = 2_000_000  # brackets and commas of a request's JSON


@dataclass(frozen=True)
class ServerConfig:
    """How the server answers.

    Attributes:
        name: The model's name in requests.
        request_limits: What one request may ask for.
        image_limits: What one image may be.
        max_request_bytes: Bytes of one request.
        max_per_address: Requests under way from one address; this machine's own has no limit.
        token: What clients must give as api_key; None lets everybody in.
        allowed_hosts: Names of this server beside its addresses, localhost and the machine's own.
    """

    name: str
    request_limits: RequestLimits = field(default_factory=RequestLimits)
    image_limits: ImageLimits = field(default_factory=ImageLimits)
    max_request_bytes: int = 32 * MIB
    max_per_address: int = 64
    token: str | None = None
    allowed_hosts: tuple[str, ...] = ()


class ServerContext:
    """The state that all routes use.

    Attributes:
        engine: The model.
        config: How the server answers.
        counts: Responses by status, "prompt_tokens" and "completion_tokens".
        start_time: When the server started, in seconds since 1970.
        num_places: Requests that may be under way.
        places: Requests under way by the client's address.
        uploads: Bodies in memory.
    """

    def __init__(self, engine: Engine, config: ServerConfig):
        self.engine = engine
        self.config = config
        self.counts: Counter = Counter()
        self.start_time = time.time()
        self.num_places = engine.max_queue + engine.max_batch
        self.places: Counter = Counter()
        self.uploads = Uploads(config.max_request_bytes)
        self.readers = asyncio.Semaphore(MAX_READERS)
        self.fetchers = asyncio.Semaphore(MAX_FETCHERS)
        self.num_fetching = 0

    @property
    def num_in_flight(self) -> int:
        """Requests that are being answered."""
        return self.places.total()

    def check_token(self, request: Request) -> None:
        """Compare the request's bearer token with the server's.

        Raises:
            APIError: 401 where the token is missing or wrong.
        """
        if self.config.token is None:
            return
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        is_right = hmac.compare_digest(token.strip().encode(), self.config.token.encode())
        if scheme.lower() != "bearer" or not is_right:
            raise APIError(
                401,
                "the bearer token is missing or wrong; give the server's token as api_key",
                "authentication_error",
                "invalid_api_key",
            )

    @contextmanager
    def admit(self, request: Request) -> Iterator[None]:
        """Hold a place among the requests under way.

        Raises:
            APIError: 429 where all places are taken, or all that one address may hold.
        """
        address = get_address(request)
        held = self.places[address]
        if self.num_in_flight >= self.num_places:
            raise build_busy_error(
                f"{self.num_in_flight} requests are under way, which is the limit;"
                " try again in a moment"
            )
        if held >= self.config.max_per_address and not _is_loopback(address):
            raise build_busy_error(
                f"{held} requests from {address} are under way, which is the limit for one"
                " address; try again in a moment"
            )
        with self.hold_place(address):
            yield

    @contextmanager
    def hold_place(self, address: str) -> Iterator[None]:
        """Count a request as under way."""
        self.places[address] += 1
        try:
            yield
        finally:
            self.places[address] -= 1
            if not self.places[address]:
                del self.places[address]

    @asynccontextmanager
    async def receive(self, request: Request) -> AsyncIterator[Upload]:
        """Receive the body of a request. It takes a place only when all of it is there.

        Whoever reads the body should release it, so that it does not wait with the request.

        Raises:
            APIError: Where it is no JSON or compressed (415), too large (413) or too slow (408),
                where there is no place for it (429), and where the client leaves (499).
        """
        content_type = request.headers.get("content-type", "")
        if content_type.partition(";")[0].strip().lower() != "application/json":
            raise APIError(
                415, "the request must be JSON; send the header Content-Type: application/json"
            )
        encoding = request.headers.get("content-encoding", "identity")
        if encoding.strip().lower() != "identity":
            raise APIError(
                415,
                f"the request's Content-Encoding is {encoding[:60]!r}, which this server does not"
                " read; send it uncompressed",
            )
        upload = await self.uploads.receive(request)
        try:
            with self.admit(request):
                yield upload
        finally:
            self.uploads.release(upload)

    async def run_reader(self, function: Callable, *arguments):
        """Call a function in a thread of its own, a few at once.

        Raises:
            APIError: 400 where the function raises a UserError.
        """
        try:
            async with self.readers:
                return await run_in_threadpool(function, *arguments)
        except SettingError as error:
            raise APIError(400, str(error), param=error.param) from None
        except UserError as error:
            raise APIError(400, str(error)) from None

    async def fetch_images(self, urls: Sequence[str]) -> dict[str, bytes]:
        """Fetch the remote images of a request.

        Returns:
            The bytes by URL; images in data URLs are not among them.

        Raises:
            APIError: 400 where one cannot be fetched, 429 where too many requests fetch images.
        """
        remote = [url for url in urls if is_remote(url)]
        if not remote:
            return {}
        if self.num_fetching >= MAX_FETCHING:
            raise build_busy_error(
                f"{self.num_fetching} requests fetch remote images, which is the limit;"
                " try again in a moment, or send data URLs"
            )
        self.num_fetching += 1
        try:
            async with self.fetchers:
                return await run_in_threadpool(fetch_all, remote, self.config.image_limits)
        except UserError as error:
            raise APIError(400, str(error)) from None
        finally:
            self.num_fetching -= 1

    def count_tokens(self, prompt_tokens: int, completion_tokens: int) -> None:
        """Count the tokens of an answered request."""
        self.counts["prompt_tokens"] += prompt_tokens
        self.counts["completion_tokens"] += completion_tokens


def read_json(data: bytearray) -> object:
    """Read JSON, unless it has so many values that reading it would take seconds.

    Raises:
        UserError: It is no JSON, or has too many values.
    """
    num_marks = sum(data.count(mark) for mark in (b"[", b"{", b","))
    if num_marks > MAX_MARKS:
        raise UserError(
            f"the request holds {num_marks} brackets and commas, but this server takes"
            f" {MAX_MARKS}; send a shorter one"
        )
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UserError(f"the request is not JSON: {error}") from None


def _is_loopback(address: str) -> bool:
    """Whether requests of an address are those of this machine, as of a proxy on it."""
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False
