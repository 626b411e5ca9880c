"""vLLM's server as a process of its own, and requests that are passed on to it.

So a replica of Ray Serve needs nothing of vLLM but its command line.
"""

from __future__ import annotations

import os
import socket
import subprocess
import time
import urllib.request
from collections.abc import AsyncIterator, Mapping, Sequence

import aiohttp
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from ..responses import build_error

HOST = "127.0.0.1"
# Ends the server with the process that started it, even where that one was killed: then `cat` is at
# the end of its input.
SCRIPT = 'exec 3<&0; "$@" & child=$!; { cat >/dev/null; kill $child; } <&3 & wait $child'
START_SECONDS = 1800.0
# Of one connection, not of the answer that it carries.
OWN_HEADERS = {"connection", "content-length", "host", "keep-alive", "te", "transfer-encoding"}


class ServerProcess:
    """A server on this machine. It ends when this process does.

    Args:
        command: The program and its arguments.
        port: The port on which it will listen.
        environment: Variables beside those of this process.
    """

    def __init__(self, command: Sequence[str], port: int, environment: Mapping[str, str]):
        self.url = f"http://{HOST}:{port}"
        self.process = subprocess.Popen(
            ["/bin/sh", "-c", SCRIPT, "sh", *command],
            stdin=subprocess.PIPE,
            env={**os.environ, **environment},
            start_new_session=True,
        )
        self.session: aiohttp.ClientSession | None = None

    def wait_until_ready(self) -> None:
        """Wait until the server answers.

        Raises:
            RuntimeError: It has ended, or needs longer than half an hour.
        """
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            self.check()
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=5):
                    return
            except OSError:
                time.sleep(0.5)
        raise RuntimeError(f"vLLM's server did not answer within {START_SECONDS:.0f} seconds")

    def check(self) -> None:
        """Raise RuntimeError where the server has ended."""
        status = self.process.poll()
        if status is not None:
            raise RuntimeError(f"vLLM's server ended with status {status}; its log says why")

    def close(self) -> None:
        """End the server."""
        self.process.communicate()  # closes its input, and waits

    async def pass_on(self, request: Request) -> Response:
        """Answer a request as the server does; a stream is passed on as it comes.

        A client that leaves ends the server's request as well.
        """
        if self.session is None:  # it belongs to the loop in which requests are answered
            timeout = aiohttp.ClientTimeout(total=None)
            self.session = aiohttp.ClientSession(timeout=timeout, auto_decompress=False)
        url = self.url + request.url.path
        if request.url.query:
            url += f"?{request.url.query}"
        try:
            response = await self.session.request(
                request.method,
                url,
                data=await request.body(),
                headers=_drop_own(request.headers),
                allow_redirects=False,
            )
        except aiohttp.ClientError as error:
            message = f"vLLM's server of this replica gave no answer ({type(error).__name__})"
            return JSONResponse(build_error(message, "server_error"), 503)
        return StreamingResponse(_read(response), response.status, _drop_own(response.headers))


def find_free_port() -> int:
    """A port of this machine on which nobody listens."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]


def _drop_own(headers: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in headers.items() if name.lower() not in OWN_HEADERS}


async def _read(response: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
    try:
        async for block in response.content.iter_any():
            yield block
    finally:
        response.close()
