"""Images of a request: data URLs, and, only where it is allowed, the public internet.

A server that fetches what strangers name could be sent to machines that only it can reach. So
every address of a host must be public, the connection goes to the address that was checked, and a
redirect is checked like the first URL.
"""

from __future__ import annotations

import http.client
import io
import ipaddress
import socket
import ssl
import threading
import time
import urllib.parse
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import NamedTuple

from PIL import Image

from ..audio import Clip, decode_audio
from ..data.image_values import decode_data_url
from ..pixels import open_upright, read_size
from ..schema import UserError
from .public_addresses import is_public

MIB = 2**20
BLOCK_BYTES = 65536
PORTS = {"http": 80, "https": 443}
REDIRECTS = (301, 302, 303, 307, 308)
SAFE_CHARACTERS = "/?%:@!$&'()*+,;=~[]"  # of a path and a query; others are quoted


@dataclass(frozen=True)
class ImageLimits:
    """What one image may be.

    Attributes:
        max_bytes: Bytes of its file.
        max_pixels: Pixels, width times height.
        remote: Whether http(s) URLs are fetched.
        seconds: Time in which an image must be fetched, redirects included.
        max_redirects: Redirects of one URL.
    """

    max_bytes: int = 20 * MIB
    max_pixels: int = 20_000_000
    remote: bool = False
    seconds: float = 10.0
    max_redirects: int = 3


def is_remote(url: str) -> bool:
    """Whether an image must be fetched from another machine."""
    return _get_scheme(url) in PORTS


def _get_scheme(url: str) -> str:
    return url.split(":", 1)[0].lower() if ":" in url[:16] else ""


def fetch_all(urls: Sequence[str], limits: ImageLimits) -> dict[str, bytes]:
    """Fetch the remote images of a request, within the time and the bytes of one.

    Returns:
        The bytes by URL.

    Raises:
        UserError: As `fetch`, and where remote images are not allowed.
    """
    fetched: dict[str, bytes] = {}
    deadline = time.monotonic() + limits.seconds
    for url in dict.fromkeys(urls):
        if not limits.remote:
            raise UserError(
                f"the image {_shorten(url)} is a remote one, which this server does not fetch; send"
                " data:image/png;base64,... with the file's bytes, or start the server with"
                " --remote"
            )
        num_left = limits.max_bytes - sum(map(len, fetched.values()))
        fetched[url] = fetch(url, replace(limits, max_bytes=num_left), deadline)
    return fetched


def read_medium(
    medium: str, url: str, limits: ImageLimits, fetched: Mapping[str, bytes] | None = None
) -> Image.Image | Clip:
    """The image, or the clip of sound, of a URL; see `read_image`.

    Args:
        medium: "image" or "audio".
        url: The URL.
        limits: What it may be.
        fetched: Bytes of remote ones.

    Raises:
        UserError: As `read_image`.
    """
    if medium == "image":
        return read_image(url, limits, fetched)
    data = _read_bytes(url, limits, fetched)
    if len(data) > limits.max_bytes:
        raise UserError(
            f"an audio has {len(data)} bytes, but this server takes {limits.max_bytes};"
            " send a shorter one"
        )
    return decode_audio(data)


def read_image(
    url: str, limits: ImageLimits, fetched: Mapping[str, bytes] | None = None
) -> Image.Image:
    """The image of a data URL, or of an http(s) URL where these are allowed; RGB, upright.

    Args:
        url: The URL.
        limits: What the image may be.
        fetched: Bytes of remote images, from `fetch_all`; others are fetched now.

    Raises:
        UserError: For other URLs, files that are no images, and images beyond a limit.
    """
    return decode_image(_read_bytes(url, limits, fetched), limits)


def _read_bytes(url: str, limits: ImageLimits, fetched: Mapping[str, bytes] | None) -> bytes:
    if _get_scheme(url) == "data":
        return decode_data_url(url)
    if not is_remote(url):
        raise UserError(
            f"the image {_shorten(url)} is neither a data URL nor http(s);"
            " send data:image/png;base64,... with the file's bytes"
        )
    if not fetched or url not in fetched:
        fetched = fetch_all([url], limits)
    return fetched[url]


def decode_image(data: bytes, limits: ImageLimits) -> Image.Image:
    """The image of a file's bytes, in RGB and upright.

    Raises:
        UserError: Where the file is not an image, broken or too large. Its size is checked before
            its pixels are read.
    """
    if len(data) > limits.max_bytes:
        raise UserError(
            f"an image has {len(data)} bytes, but this server takes {limits.max_bytes};"
            " send a smaller one"
        )
    width, height = read_size(io.BytesIO(data), "an image")
    if width * height > limits.max_pixels:
        raise UserError(
            f"an image has {width} x {height} pixels, but this server takes {limits.max_pixels};"
            " send a smaller one"
        )
    return open_upright(io.BytesIO(data), "an image")


def fetch(url: str, limits: ImageLimits, deadline: float | None = None) -> bytes:
    """The bytes behind a public http(s) URL.

    Args:
        url: The URL.
        limits: What the image may be.
        deadline: When it must be there, in seconds of `time.monotonic`; None takes the limits'.

    Raises:
        UserError: For private addresses, failures, and where a limit is passed.
    """
    deadline = time.monotonic() + limits.seconds if deadline is None else deadline
    for _ in range(limits.max_redirects + 1):
        response = _get(url, limits, deadline)
        if response.status == 200:
            return response.data
        if response.status not in REDIRECTS:
            raise UserError(
                f"the image {_shorten(url)} could not be fetched: its server answered with status"
                f" {response.status}; send the file's bytes as a data URL"
            )
        if not response.location:
            raise UserError(
                f"the image {_shorten(url)} is redirected without a new URL;"
                " send the file's bytes as a data URL"
            )
        url = urllib.parse.urljoin(url, response.location)
    raise UserError(
        f"an image is redirected more than {limits.max_redirects} times, last to {_shorten(url)};"
        " give its final URL"
    )


def find_public_address(host: str, port: int, deadline: float | None = None) -> str:
    """An address of a host.

    Args:
        host: Its name or address.
        port: The port to connect to.
        deadline: When it must be known, in seconds of `time.monotonic`.

    Raises:
        UserError: Where any of the host's addresses is not public, and for unknown hosts.
    """
    try:
        entries = _look_up(host, port, deadline)
    except (OSError, ValueError) as error:  # ValueError: characters that no host has
        raise UserError(
            f"the host {_shorten(host)} of an image is not known ({error});"
            " send the file's bytes as a data URL"
        ) from None
    addresses = sorted({entry[4][0] for entry in entries})
    for address in addresses:
        without_zone = address.split("%")[0]
        if not is_public(ipaddress.ip_address(without_zone)):
            raise UserError(
                f"the host {_shorten(host)} of an image has the address {address}, which is not"
                " public; send the file's bytes as a data URL"
            )
    return addresses[0]


def _look_up(host: str, port: int, deadline: float | None) -> list:
    """`getaddrinfo` has no timeout, so it has a thread of its own, which is left alone if slow."""
    if deadline is None:
        return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    future: Future = Future()

    def look_up() -> None:
        try:
            future.set_result(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        except Exception as error:  # raised in the waiting thread
            future.set_exception(error)

    threading.Thread(target=look_up, daemon=True).start()
    return future.result(max(0, deadline - time.monotonic()))


class FetchedResponse(NamedTuple):
    """The response to one GET: the data of status 200, or where another status redirects to."""

    status: int
    data: bytes = b""
    location: str | None = None


class Target(NamedTuple):
    """The parts of an http(s) URL that a request needs."""

    scheme: str
    host: str
    port: int
    path: str


def _parse_url(url: str) -> Target:
    problem = f"{_shorten(url)} is not an http(s) URL of an image; give https://host/image.png"
    try:
        parts = urllib.parse.urlsplit(url)
        port = parts.port
    except ValueError:
        raise UserError(problem) from None
    if parts.scheme not in PORTS or not parts.hostname or parts.username is not None:
        raise UserError(problem)
    path = parts.path or "/"
    if parts.query:
        path = f"{path}?{parts.query}"
    try:
        path = urllib.parse.quote(path, safe=SAFE_CHARACTERS)
    except UnicodeEncodeError:  # half a character
        raise UserError(problem) from None
    return Target(parts.scheme, parts.hostname, port or PORTS[parts.scheme], path)


def _get(url: str, limits: ImageLimits, deadline: float) -> FetchedResponse:
    """One GET request to a public address."""
    target = _parse_url(url)
    address = find_public_address(target.host, target.port, deadline)
    headers = {"User-Agent": "sparsecut", "Accept": "image/*"}
    try:
        with _connect(target, address, deadline) as connection:
            connection.request("GET", target.path, headers=headers)
            response = connection.getresponse()
            if response.status != 200:
                return FetchedResponse(response.status, location=response.getheader("Location"))
            return FetchedResponse(200, _read_data(response, url, limits, deadline))
    except UserError:
        raise
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = str(error) or type(error).__name__
        if time.monotonic() >= deadline:
            reason = "it took too long"
        raise UserError(
            f"the image {_shorten(url)} could not be fetched ({reason});"
            " send the file's bytes as a data URL"
        ) from None


@contextmanager
def _connect(target: Target, address: str, deadline: float) -> Iterator[http.client.HTTPConnection]:
    """A connection to the address that was checked.

    A second look-up of the host's name could give another address.
    """
    connection = http.client.HTTPConnection(target.host, target.port)
    sock = socket.create_connection((address, target.port), timeout=_get_seconds_left(deadline))
    if target.scheme == "https":
        context = ssl.create_default_context()
        sock = context.wrap_socket(sock, server_hostname=target.host, do_handshake_on_connect=False)
    # The timeout of a socket begins anew with every byte, so a slow site could hold it for hours.
    # A timer cuts it off.
    timer = threading.Timer(_get_seconds_left(deadline), _cut_off, [sock])
    timer.daemon = True
    timer.start()
    try:
        if target.scheme == "https":
            sock.do_handshake()
        connection.sock = sock
        yield connection
    finally:
        timer.cancel()
        connection.close()
        sock.close()


def _cut_off(sock: socket.socket) -> None:
    with suppress(OSError):  # it may be closed by now
        # Not the method of an SSL socket, which would wait for the other side.
        socket.socket.shutdown(sock, socket.SHUT_RDWR)


def _read_data(
    response: http.client.HTTPResponse, url: str, limits: ImageLimits, deadline: float
) -> bytes:
    data = bytearray()
    while True:
        block = response.read1(BLOCK_BYTES)
        _get_seconds_left(deadline)
        if not block:
            return bytes(data)
        data += block
        if len(data) > limits.max_bytes:
            raise UserError(
                f"the image {_shorten(url)} has more than the {limits.max_bytes} bytes that this"
                " server takes; send a smaller one"
            )


def _get_seconds_left(deadline: float) -> float:
    """Seconds until a deadline; TimeoutError where there are none."""
    seconds = deadline - time.monotonic()
    if seconds <= 0:
        raise TimeoutError("it took too long")
    return seconds


def _shorten(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."
