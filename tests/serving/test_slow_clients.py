"""Clients that send slowly, too much or nothing keep no other client out."""

import asyncio
import json
import socket
import threading
import time
from contextlib import ExitStack, contextmanager

import pytest
from helpers.clients import complete, make_messages, post, start_server, uvicorn
from helpers.tiny import tiny_model

from sparsecut.serving import connections, uploads
from sparsecut.serving.admission import MAX_MARKS, ServerConfig
from sparsecut.serving.connections import ConnectionGuard, make_protocol
from sparsecut.serving.engine import Engine
from sparsecut.serving.server import make_app

MAX_BYTES = 100_000
HEAD = (
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: a.localhost\r\nContent-Type: application/json\r\n"
)
MESSAGES = make_messages("red")


def connect(client) -> socket.socket:
    return socket.create_connection(("127.0.0.1", client.base_url.port), timeout=20)


def read_status(connection: socket.socket) -> int:
    return int(connection.makefile("rb").readline().split()[1])


@pytest.fixture(scope="module")
def small():
    """Eight requests may be under way."""
    engine = Engine(*tiny_model(), max_batch=4, max_queue=4)
    with start_server(engine, max_request_bytes=MAX_BYTES, max_per_address=2) as client:
        client.engine = engine
        yield client
    engine.close()


def test_slow_uploads_take_no_places(small):
    with ExitStack() as stack:
        for _ in range(60):
            connection = stack.enter_context(connect(small))
            connection.sendall(HEAD + b"Content-Length: 900\r\n\r\n{")
        start = time.monotonic()
        for _ in range(3):
            assert complete(small, MESSAGES, max_tokens=1).choices
        assert time.monotonic() - start < 5


def test_large_uploads_that_stop_are_cut_where_they_fill_the_memory(small, monkeypatch):
    monkeypatch.setattr(uploads, "MAX_BODIES", 3)
    with ExitStack() as stack:
        hostile = []
        for _ in range(6):
            connection = stack.enter_context(connect(small))
            size = MAX_BYTES - 10
            connection.sendall(HEAD + f"Content-Length: {size}\r\n\r\n".encode())
            connection.sendall(b" " * (size - 1))
            hostile.append(connection)
        assert read_status(hostile[0]) == 408
        assert complete(small, MESSAGES, max_tokens=1).choices


def test_a_body_that_is_announced_too_large_is_refused_at_once(small):
    with connect(small) as connection:
        connection.sendall(HEAD + b"Content-Length: 100001\r\nExpect: 100-continue\r\n\r\n")
        start = time.monotonic()
        assert read_status(connection) == 413
        assert time.monotonic() - start < 1
    for length in (b"9" * 30, b"-1", b"x", b"5, 6"):
        with connect(small) as connection:
            connection.sendall(HEAD + b"Content-Length: " + length + b"\r\n\r\n")
            assert read_status(connection) in (400, 413)


@pytest.mark.parametrize("extra", [b"", b"Authorization: Bearer wrong\r\n", b"Origin: null\r\n"])
def test_an_endless_body_is_cut(small, extra):
    sent = 0
    with connect(small) as connection:
        connection.sendall(HEAD + extra + b"Transfer-Encoding: chunked\r\n\r\n")
        deadline = time.monotonic() + 15
        with pytest.raises(OSError):
            while time.monotonic() < deadline:
                connection.sendall(b"2710\r\n" + b" " * 10_000 + b"\r\n")
                sent += 10_000
                time.sleep(0.001)
    assert sent


def test_an_honest_client_hears_that_its_request_is_too_large(small):
    text = json.dumps({"messages": make_messages("a" * 5_000_000)})
    assert post(small, text).status_code == 413


def test_one_address_cannot_take_all_places(small, monkeypatch):
    app_context = make_app(small.engine, ServerConfig("tiny", max_per_address=2)).state.context

    class Request:
        def __init__(self, host):
            self.client = type("Client", (), {"host": host})()

    def take(*hosts: str) -> int:
        with ExitStack() as stack:
            num_taken = 0
            for host in hosts:
                try:
                    stack.enter_context(app_context.admit(Request(host)))
                except Exception as error:
                    assert error.status == 429
                    continue
                num_taken += 1
            return num_taken

    assert take(*["9.9.9.9"] * 5) == 2
    assert take("2600::1:1", "2600::2:2", "2600::3", "2600:0:0:1::1") == 3
    assert take(*["9.9.9.9"] * 5, "8.8.8.8") == 3
    assert take(*["127.0.0.1"] * 9) == 8  # all places; a proxy on this machine
    assert app_context.num_in_flight == 0
    assert not app_context.places


def test_json_of_a_million_values_does_not_stop_the_others(small, monkeypatch):
    monkeypatch.setattr("sparsecut.serving.admission.MAX_MARKS", 1000)
    response = post(small, '{"messages": [' + "[]," * 2000 + "1]}")
    assert response.status_code == 400
    assert "1000" in response.text
    assert MAX_MARKS > 1_000_000  # commas of the longest text that is taken


def test_the_body_does_not_wait_with_its_request(small):
    context = make_app(small.engine, ServerConfig("tiny")).state.context
    assert not context.uploads.uploads
    release, is_held = threading.Event(), threading.Event()
    small.engine.run(lambda: is_held.set() or release.wait(20))
    is_held.wait()
    try:
        thread = threading.Thread(target=complete, args=[small, MESSAGES])
        thread.start()
        while not small.engine.waiting:
            time.sleep(0.01)
        held = small.engine.waiting[0].request
        assert not hasattr(held, "messages")
    finally:
        release.set()
        thread.join()


# ---- connections, with the protocol of `sparsecut serve`


@contextmanager
def serve(engine, protocol):
    """The port of a server with this protocol."""
    config = uvicorn.Config(
        make_app(engine, ServerConfig("tiny")), port=0, http=protocol, log_level="error"
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        thread.join()


def ask(port: int, connection: socket.socket | None = None) -> int:
    connection = connection or socket.create_connection(("127.0.0.1", port), timeout=20)
    body = json.dumps({"messages": MESSAGES, "max_tokens": 1}).encode()
    connection.sendall(HEAD + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
    response = connection.recv(65536)
    return int(response.split()[1])


def is_closed(connection: socket.socket) -> bool:
    """Whether the server ends a connection; what it sends before does not matter."""
    try:
        while connection.recv(65536):
            pass
    except ConnectionError:
        return True
    except TimeoutError:
        return False
    return True


def test_slow_heads_and_silent_connections_end(small, monkeypatch):
    monkeypatch.setattr(connections, "HEADER_SECONDS", 0.3)
    with serve(small.engine, make_protocol()) as port, ExitStack() as stack:

        def open_connection(start: bytes) -> socket.socket:
            connection = socket.create_connection(("127.0.0.1", port), timeout=5)
            connection.sendall(start)
            return stack.enter_context(connection)

        kept = open_connection(b"")
        assert ask(port, kept) == 200
        kept.sendall(HEAD[:20])  # a slow head after a whole request
        silent = [open_connection(start) for start in (b"", HEAD[:9], HEAD)]
        assert all(map(is_closed, [*silent, kept]))
        assert ask(port) == 200


def test_a_new_client_comes_in_where_all_connections_are_silent(small):
    with serve(small.engine, make_protocol(max_connections=20)) as port, ExitStack() as stack:
        hostile = []
        for i in range(50):
            connection = socket.create_connection(("127.0.0.1", port), timeout=5)
            hostile.append(stack.enter_context(connection))
            heads = (b"", HEAD, HEAD + b"Content-Length: 90\r\n\r\n{")
            connection.sendall(heads[i % 3])
        assert ask(port) == 200
        assert is_closed(hostile[0])
        hostile[-1].setblocking(False)
        with pytest.raises(BlockingIOError):  # the newest are open
            hostile[-1].recv(1)


def test_a_running_request_is_never_cut_for_a_new_connection():
    guard = ConnectionGuard(2)
    aborted = []

    def make_connection(name: str):
        transport = type("Transport", (), {"abort": lambda self: aborted.append(name)})()
        return type("Connection", (), {"transport": transport})()

    running = make_connection("running")
    guard.add(running, "a")
    del guard.silent[running]  # its body is there
    for name in ("first", "second", "third"):
        guard.add(make_connection(name), "b")
    assert aborted == ["first", "second"]
    assert running in guard.open


def test_a_client_that_does_not_read_its_stream_loses_its_place(small, monkeypatch):
    from sparsecut.serving import server

    monkeypatch.setattr(server, "READ_SECONDS", 0.2)
    app = make_app(small.engine, ServerConfig("tiny"))
    context = app.state.context
    sent = []

    async def send(message):
        sent.append(message["type"])
        if len(sent) > 1:
            await asyncio.sleep(60)  # the client does not read

    body = json.dumps({"messages": MESSAGES, "stream": True, "max_tokens": 5}).encode()
    parts = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive():
        if parts:
            return parts.pop()
        await asyncio.sleep(60)

    headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
    scope = {
        "type": "http", "method": "POST", "path": "/v1/chat/completions", "query_string": b"",
        "headers": headers, "client": ("9.9.9.9", 5), "asgi": {"spec_version": "2.3"},
        "http_version": "1.1", "scheme": "http", "root_path": "", "raw_path": b"",
    }  # fmt: skip
    start = time.monotonic()
    try:
        asyncio.run(app(scope, receive, send))
    except Exception as error:
        assert "read" in str(error)
    assert time.monotonic() - start < 10
    assert context.num_in_flight == 0
