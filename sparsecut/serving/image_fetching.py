"""Pictures from a request: data URLs, and, only where it is allowed, the public internet.

A server that fetches what strangers name could be sent to machines that only it can reach. So every address that a host has must
be a public one, the connection goes to the address that was checked, and a redirect is checked like the first URL.
"""

from __future__ import annotations

import base64
import http.client
import io
import ipaddress
import socket
import ssl
import threading
import time
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from PIL import Image

from ..imaging import open_upright
from ..schema import UserError

FORMATS = ("PNG", "JPEG", "GIF", "WEBP", "BMP")  # others would wake decoders that nobody needs here
REDIRECTS = (301, 302, 303, 307, 308)
SAFE = "/?%:@!$&'()*+,;=~[]"  # of a path and a query, what stays as it is
BLOCK = 65536
GIVEN_OUT = ipaddress.ip_network(
    "2000::/3"
)  # the addresses of IPv6 that are anyone's (RFC 4291, section 2.4)
MIB = 2**20


@dataclass(frozen=True)
class ImageLimits:
    """What one picture may be: bytes of its file, pixels, and whether and how it may be fetched
    from elsewhere.
    """

    max_bytes: int = 20 * MIB
    max_pixels: int = 20_000_000
    remote: bool = False
    seconds: float = 10.0
    max_redirects: int = 3


def picture_of(url: str, limits: ImageLimits) -> Image.Image:
    """The picture of a data URL, or of a remote one where these are allowed, in RGB and upright;
    ValueError for any other.
    """
    scheme = url.split(":", 1)[0].lower() if ":" in url[:16] else ""
    if scheme == "data":
        return picture_in(data_of(url), limits)
    if scheme not in ("http", "https"):
        raise UserError(
            f"the picture {_short(url)} is neither a data URL nor http(s); send"
            " data:image/png;base64,... with the file's bytes"
        )
    if not limits.remote:
        raise UserError(
            "this server fetches no pictures from elsewhere; send data:image/png;base64,... with"
            " the file's bytes, or start the server with --remote"
        )
    return picture_in(fetch(url, limits), limits)


def data_of(url: str) -> bytes:
    """The bytes of a base64 data URL; ValueError where it is none."""
    head, comma, body = url.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise UserError(
            f"the picture {_short(url)} is no base64 data URL; send data:image/png;base64,... with"
            " the file's bytes"
        )
    try:
        return base64.b64decode(urllib.parse.unquote(body), validate=True)
    except ValueError as error:
        raise UserError(
            f"the picture {_short(url)} holds broken base64 ({error}); encode the file's bytes"
            " again"
        ) from None


def picture_in(data: bytes, limits: ImageLimits) -> Image.Image:
    """The picture of a file's bytes; ValueError where it is none, broken or too large, before its
    pixels are read.
    """
    if len(data) > limits.max_bytes:
        raise UserError(
            f"a picture has {len(data)} bytes, but this server takes {limits.max_bytes}; send a"
            " smaller one"
        )
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as opened:
            width, height = opened.size
        if width * height <= limits.max_pixels:
            return open_upright(io.BytesIO(data))
    except (
        Exception
    ) as error:  # of many kinds: what Pillow meets in a broken file is seldom caught there
        unknown = isinstance(error, Image.UnidentifiedImageError)
        reason = "it is none of these formats" if unknown else f"it is broken or too large: {error}"
        raise UserError(f"a picture cannot be read ({reason}); send {', '.join(FORMATS)}") from None
    raise UserError(
        f"a picture has {width} x {height} pixels, but this server takes {limits.max_pixels}; send"
        " a smaller one"
    )


def fetch(url: str, limits: ImageLimits) -> bytes:
    """The bytes behind a public http(s) URL; ValueError for private addresses and where a limit is
    passed.
    """
    until = time.monotonic() + limits.seconds
    for _ in range(limits.max_redirects + 1):
        status, value = _get(url, limits, until)
        if status == 200:
            return value
        if status not in REDIRECTS:
            raise UserError(
                f"the picture {_short(url)} could not be fetched: the answer was {status}; send its"
                " bytes"
            )
        if not value:
            raise UserError(
                f"the picture {_short(url)} is redirected to nowhere; send its bytes as a data URL"
            )
        url = urllib.parse.urljoin(url, value)
    raise UserError(
        f"a picture is redirected more than {limits.max_redirects} times, last to {_short(url)};"
        " give its final URL"
    )


def public_address(host: str, port: int) -> str:
    """An address of a host, all of which must be public; ValueError for any that is not and for
    unknown hosts.
    """
    try:
        found = {entry[4][0] for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)}
    except (OSError, UnicodeError) as error:
        raise UserError(
            f"the host {_short(host)} of a picture is not known ({error}); send its bytes as a"
            " data URL"
        ) from None
    for address in found:
        if not _is_public(ipaddress.ip_address(address.split("%")[0])):
            raise UserError(
                f"the host {_short(host)} of a picture has the address {address}, which is not a"
                " public one; this server fetches from public addresses only, so send the file's"
                " bytes as a data URL"
            )
    return sorted(found)[0]


def _is_public(address) -> bool:
    """Addresses of IPv4 that are written as IPv6 ones count as what they stand for, where that can
    be told.
    """
    inner = getattr(address, "ipv4_mapped", None) or getattr(address, "sixtofour", None)
    if inner is not None:
        return _is_public(inner)
    # The others that carry an IPv4 address (compatible, translated, NAT64) lie outside of what is
    # given out, and may lead inside.
    given_out = address.version == 4 or (address in GIVEN_OUT and address.teredo is None)
    return given_out and address.is_global and not address.is_multicast


def _get(url: str, limits: ImageLimits, until: float) -> tuple[int, bytes | str | None]:
    """One request: (200, bytes), or another status with where it redirects to."""
    try:
        parts = urllib.parse.urlsplit(url)
        host, port = parts.hostname, parts.port or {"http": 80, "https": 443}[parts.scheme]
        if not host or parts.username is not None:
            raise KeyError
        path = urllib.parse.quote(f"{parts.path or '/'}?{parts.query}".removesuffix("?"), safe=SAFE)
    except (KeyError, ValueError):
        raise UserError(
            f"{_short(url)} is no http(s) URL of a picture; give one as https://host/picture.png"
        ) from None
    address = public_address(host, port)
    try:
        with _connected(parts.scheme, host, port, address, until) as connection:
            connection.request(
                "GET", path, headers={"User-Agent": "sparsecut", "Accept": "image/*"}
            )
            answer = connection.getresponse()
            if answer.status != 200:
                return answer.status, answer.getheader("Location")
            return 200, _read(answer, url, limits, until)
    except (OSError, http.client.HTTPException, UnicodeError) as error:
        reason = (
            str(error) or type(error).__name__ if time.monotonic() < until else "it took too long"
        )
        raise UserError(
            f"the picture {_short(url)} could not be fetched ({reason}); send its bytes as a"
            " data URL"
        ) from None


@contextmanager
def _connected(
    scheme: str, host: str, port: int, address: str, until: float
) -> Iterator[http.client.HTTPConnection]:
    """A connection to the address that was checked, which a second look-up of the name could no
    longer change.
    """
    connection = http.client.HTTPConnection(host, port)
    sock = socket.create_connection((address, port), timeout=_left(until))
    if scheme == "https":
        context = ssl.create_default_context()
        sock = context.wrap_socket(sock, server_hostname=host, do_handshake_on_connect=False)
    # A timeout of the socket begins anew with every byte, so a slow site could hold on for hours:
    # it is cut off.
    watch = threading.Timer(_left(until), _cut_off, [sock])
    watch.daemon = True
    watch.start()
    try:
        if scheme == "https":
            sock.do_handshake()
        connection.sock = sock
        yield connection
    finally:
        watch.cancel()
        connection.close()
        sock.close()


def _cut_off(sock: socket.socket) -> None:
    with suppress(OSError):  # it may be closed by now
        socket.socket.shutdown(sock, socket.SHUT_RDWR)


def _read(answer, url: str, limits: ImageLimits, until: float) -> bytes:
    data = bytearray()
    while True:
        block = answer.read1(BLOCK)
        _left(until)
        if not block:
            return bytes(data)
        data += block
        if len(data) > limits.max_bytes:
            raise UserError(
                f"the picture {_short(url)} has more than the {limits.max_bytes} bytes that this"
                " server takes; send a smaller one"
            )


def _left(until: float) -> float:
    left = until - time.monotonic()
    if left <= 0:
        raise TimeoutError("it took too long")
    return left


def _short(url: str) -> str:
    return url if len(url) <= 60 else f"{url[:57]}..."
