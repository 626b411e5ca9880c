"""Connections of clients: how many there may be, and how long they may wait without a request.

uvicorn waits for ever for the first request of a connection, and for a client that does not read
its answer. So a few hundred silent clients could take all connections that the system allows.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable

import uvicorn
from uvicorn.protocols.http.auto import AutoHTTPProtocol

from .uploads import name_network

try:
    import resource
except ImportError:  # Windows
    resource = None

HEADER_SECONDS = 15.0  # in which the head of a request must arrive
READ_SECONDS = 60.0  # in which a client must read the rest of an answer
MAX_CONNECTIONS = 2000
MAX_SILENT_PER_ADDRESS = 512  # connections of one address whose request is not there yet
RESERVED_FILES = 64  # files that the process opens for other things
FINISH_SECONDS = 5.0  # that requests have to end after a signal to the server
REFUSE_SECONDS = 5.0  # in which what is left then hears that the server ends


class ConnectionGuard:
    """All connections of a server.

    Where there are too many, the one that has been without a whole request for longest is cut off,
    first among those of the address that has most of these. So a new client always comes in.

    Attributes:
        max_connections: Connections at most.
        open: All connections.
        silent: Those whose request has not arrived whole, the oldest first, with their address.
    """

    def __init__(self, max_connections: int | None = None):
        self.max_connections = max_connections or _count_possible_connections()
        self.open: set[GuardedProtocol] = set()
        self.silent: dict[GuardedProtocol, str] = {}

    def add(self, connection: GuardedProtocol, address: str) -> None:
        """Note a new connection; may cut another one off, or this one."""
        self.open.add(connection)
        self.silent[connection] = address
        counts = Counter(self.silent.values())
        if len(self.open) > self.max_connections:
            self._cut_oldest(counts.most_common(1)[0][0])
        elif counts[address] > MAX_SILENT_PER_ADDRESS:
            self._cut_oldest(address)

    def _cut_oldest(self, address: str) -> None:
        victim = next(other for other, place in self.silent.items() if place == address)
        self.remove(victim)
        victim.transport.abort()

    def remove(self, connection: GuardedProtocol) -> None:
        """Forget a connection."""
        self.open.discard(connection)
        self.silent.pop(connection, None)


def _count_possible_connections() -> int:
    if resource is None:
        return MAX_CONNECTIONS
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY:
        return MAX_CONNECTIONS
    return max(16, min(MAX_CONNECTIONS, limit - RESERVED_FILES))


class GuardedProtocol(AutoHTTPProtocol):
    """uvicorn's protocol for one connection, which ends where nothing comes.

    `make_protocol` sets the guard.
    """

    guard: ConnectionGuard

    def connection_made(self, transport) -> None:
        """Begin to wait for a request."""
        super().connection_made(transport)
        self.num_running = 0
        self.timer: asyncio.TimerHandle | None = None
        self.unguarded_app = self.app
        self.app = self._run_app
        peer = transport.get_extra_info("peername")
        self.address = name_network(peer[0]) if peer else ""
        self.guard.add(self, self.address)
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        self._stop_waiting()
        self.guard.remove(self)
        super().connection_lost(exc)

    def _wait(self) -> None:
        self.wait_start = time.monotonic()
        self._stop_waiting()
        self.timer = self.loop.call_later(HEADER_SECONDS, self._end_waiting)

    def _stop_waiting(self) -> None:
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None

    def _end_waiting(self) -> None:
        seconds = time.monotonic() - self.wait_start
        if self.transport.get_write_buffer_size() and seconds < READ_SECONDS:
            self.timer = self.loop.call_later(HEADER_SECONDS, self._end_waiting)
        else:
            self.transport.abort()

    async def _run_app(self, scope, receive, send) -> None:
        """Answer a request; until its body is there, the connection counts as silent."""

        async def receive_and_note() -> dict:
            message = await receive()
            if message["type"] == "http.request" and not message.get("more_body"):
                self.guard.silent.pop(self, None)
            return message

        self._stop_waiting()
        self.num_running += 1
        try:
            await self.unguarded_app(scope, receive_and_note, send)
        finally:
            self.num_running -= 1
            if not self.num_running and self in self.guard.open:
                self.guard.silent.pop(self, None)
                self.guard.silent[self] = self.address  # now the newest
                self._wait()


def make_protocol(max_connections: int | None = None) -> type[GuardedProtocol]:
    """A protocol class for one server; uvicorn makes one object of it for each connection.

    Args:
        max_connections: Connections at most; None takes what the system allows.
    """
    guard = ConnectionGuard(max_connections)
    return type("ServerProtocol", (GuardedProtocol,), {"guard": guard})


class EndingServer(uvicorn.Server):
    """uvicorn's server. At its end every client hears what became of its request.

    Requests may finish for `FINISH_SECONDS`. Then the engine is closed, which sends the rest an
    error. uvicorn alone would cut them off without a word.

    Args:
        app: The web application.
        close: Closes the engine; may be called more than once.
    """

    def __init__(self, app: Callable, close: Callable[[], None]):
        config = uvicorn.Config(
            app,
            http=make_protocol(),
            ws="none",
            log_level="warning",
            timeout_graceful_shutdown=int(FINISH_SECONDS + REFUSE_SECONDS),
        )
        super().__init__(config)
        self.close = close

    async def shutdown(self, sockets: list | None = None) -> None:
        """Take no more requests, and end when those under way have ended."""
        loop = asyncio.get_running_loop()
        timer = loop.call_later(FINISH_SECONDS, loop.run_in_executor, None, self.close)
        try:
            await super().shutdown(sockets)
        finally:
            timer.cancel()
