"""What every request passes first: its id, the names it may use for this server, its failures.

A page in a browser can send requests to every server that the browser reaches. Two checks keep
foreign pages out. `Origin` must name this server. So must `Host`, because a foreign site may give
its own name our address (DNS rebinding).
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import socket
import uuid
from collections import Counter
from collections.abc import Collection
from contextlib import suppress
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse

from .responses import build_error

logger = logging.getLogger(__name__)

ANY_HOST = "*"
DRAIN_SECONDS = 2.0  # in which a refused client may still send
DEFAULT_PORTS = (":80", ":443")


class HostNames:
    """The names under which a server may be called.

    Addresses, localhost and this machine's own name are always among them: no foreign site can
    have these names.

    Attributes:
        names: Further names, in small letters; `*` allows all.
    """

    def __init__(self, names: Collection[str] = ()):
        self.names = {name.lower().rstrip(".") for name in names}

    def allows_host(self, host: str) -> bool:
        """Whether a request may have this Host header, with or without a port."""
        name = _get_name(host)
        if name is None:
            return False
        is_own = name == "localhost" or name.endswith(".localhost") or name in _list_own_names()
        return is_own or _is_address(name) or name in self.names or ANY_HOST in self.names

    def allows_origin(self, origin: str, host: str) -> bool:
        """Whether a page of this origin may send a request to this host.

        It is the server's own page, or that of a name which was allowed (behind a proxy that sends
        another Host).
        """
        if ANY_HOST in self.names:
            return True
        try:
            place = urlsplit(origin).netloc.lower()
        except ValueError:
            return False
        if not place or "@" in place:  # such as null, the origin of a file
            return False
        is_own_page = _drop_default_port(place) == _drop_default_port(host.lower())
        return is_own_page or _get_name(place) in self.names


def _list_own_names() -> set[str]:
    name = socket.gethostname().lower()
    return {name, f"{name}.local"}


def _get_name(host: str) -> str | None:
    """The name or address in a Host header, without port and brackets; None for other texts."""
    try:
        parts = urlsplit(f"//{host}")
        name = parts.hostname
        _ = parts.port  # refuses what is no number
    except ValueError:
        return None
    is_clean = parts.netloc == host and "@" not in host
    return name.rstrip(".") if name and is_clean else None


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _drop_default_port(place: str) -> str:
    for port in DEFAULT_PORTS:
        place = place.removesuffix(port)
    return place


class UnreadBody:
    """What of a request's body has not arrived yet."""

    def __init__(self, headers: Headers, receive):
        length = headers.get("content-length", "0")
        self.is_unread = length != "0" or "transfer-encoding" in headers
        self._receive = receive

    async def receive(self) -> dict:
        """The next part of the body."""
        message = await self._receive()
        if message["type"] != "http.request" or not message.get("more_body"):
            self.is_unread = False
        return message

    async def drain(self) -> None:
        """Throw away what still comes, for a moment."""
        with suppress(TimeoutError):
            async with asyncio.timeout(DRAIN_SECONDS):
                while self.is_unread:
                    await self.receive()


def is_last(message: dict) -> bool:
    """Whether a message ends a response."""
    return message["type"] == "http.response.body" and not message.get("more_body")


class Gate:
    """Middleware: gives every request an id, checks its names, and counts responses by status.

    A failure is logged with the id, which the client gets in the message and as X-Request-Id.
    """

    def __init__(self, app, counts: Counter, host_names: HostNames):
        self.app = app
        self.counts = counts
        self.host_names = host_names

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        body = UnreadBody(Headers(scope=scope), receive)
        request_id = f"req-{uuid.uuid4().hex[:16]}"
        scope.setdefault("state", {})["request_id"] = request_id
        has_started = False

        async def count_and_send(message) -> None:
            nonlocal has_started
            if message["type"] == "http.response.start":
                has_started = True
                self.counts[message["status"]] += 1
                headers = MutableHeaders(scope=message)
                headers["X-Request-Id"] = request_id
                headers["X-Content-Type-Options"] = "nosniff"
                if body.is_unread:
                    headers["Connection"] = "close"
            if is_last(message) and body.is_unread:
                # A connection that is closed while data comes loses the answer as well.
                await send({**message, "more_body": True})
                await body.drain()
                message = {"type": "http.response.body"}
            await send(message)

        response = self._refuse(Headers(scope=scope))
        try:
            await (response or self.app)(scope, body.receive, count_and_send)
        except Exception as error:
            log_failure(request_id, error)
            if has_started:
                raise
            content = build_error(describe_failure(request_id), "server_error")
            await JSONResponse(content, 500)(scope, body.receive, count_and_send)

    def _refuse(self, headers: Headers) -> JSONResponse | None:
        """The response to a request that must not come in."""
        hosts = headers.getlist("host")
        if len(hosts) > 1:
            return _build_refusal("the request has more than one Host; send one")
        host = hosts[0] if hosts else ""  # HTTP/1.0 has none, and browsers always send it
        if host and not self.host_names.allows_host(host):
            return _build_refusal(
                f"the request is for the host {host!r}, which is not a name of this server; call"
                " it by its address, or start the server with --allowed-host and the name"
            )
        for origin in headers.getlist("origin"):
            if not self.host_names.allows_origin(origin, host):
                return _build_refusal(
                    f"the request comes from a page of {origin!r}, which is not this server's;"
                    " start the server with --allowed-host and the page's host if that is meant"
                )
        return None


def _build_refusal(message: str) -> JSONResponse:
    return JSONResponse(build_error(message, "permission_error", "forbidden"), 403)


def log_failure(request_id: str, error: Exception) -> None:
    """Log a failure with its traceback, under the id that the client gets."""
    logger.error("request %s failed", request_id, exc_info=error)


def describe_failure(request_id: str, error: Exception | None = None) -> str:
    """What a client is told about a failure; its text stays in the log."""
    kind = f" ({type(error).__name__})" if error is not None else ""
    return f"the server failed at this request{kind}; its log says more under {request_id}"
