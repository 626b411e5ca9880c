"""Bodies of requests on their way in: each within a time, all of them within some memory."""

from __future__ import annotations

import asyncio
import ipaddress
from collections import Counter
from dataclasses import dataclass, field

from starlette.requests import ClientDisconnect, Request

from .errors import APIError, build_busy_error

UPLOAD_SECONDS = 60.0  # time in which a request must have arrived
MAX_BODIES = 16  # requests of the largest size that fit into memory before they are read
IPV6_PREFIX = 64  # bits of an IPv6 address that belong to one network


def get_address(request: Request) -> str:
    """The client's address, as limits count it."""
    return name_network(request.client.host) if request.client else ""


def name_network(host: str) -> str:
    """An IPv4 address, or the network of an IPv6 address, which one client has as a whole."""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host
    if address.version == 6 and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    if address.version == 6 and not address.is_loopback:
        return str(ipaddress.ip_network((address, IPV6_PREFIX), strict=False))
    return str(address)


@dataclass(eq=False)
class Upload:
    """A body in memory.

    Attributes:
        address: The client's address.
        timeout: Ends the upload while it arrives; None when all of it is there.
        data: What has arrived.
    """

    address: str
    timeout: asyncio.Timeout | None = None
    data: bytearray = field(default_factory=bytearray)


class Uploads:
    """All bodies in memory.

    Where they are too much together, the oldest unfinished upload of the address that holds most is
    cut off. So slow or large uploads cannot keep other clients out.

    Attributes:
        max_bytes: Bytes of one body at most.
        uploads: The bodies, the oldest first.
    """

    def __init__(self, max_bytes: int):
        self.max_bytes = max_bytes
        self.uploads: dict[Upload, None] = {}

    async def receive(self, request: Request) -> Upload:
        """Receive the body of a request. Its bytes count until it is released.

        Raises:
            APIError: Where it is too large (413) or too slow (408), where the memory is full (429),
                and where the client leaves (499).
        """
        self._check_announced_size(request)
        upload = Upload(get_address(request))
        self.uploads[upload] = None
        try:
            await self._receive(request, upload)
        except BaseException:
            self.release(upload)
            raise
        return upload

    def release(self, upload: Upload) -> None:
        """Forget a body."""
        self.uploads.pop(upload, None)
        upload.data = bytearray()

    def _check_announced_size(self, request: Request) -> None:
        length = request.headers.get("content-length", "")
        if length.isdecimal() and int(length[:20]) > self.max_bytes:
            raise self._build_size_error()

    def _build_size_error(self) -> APIError:
        return APIError(
            413,
            f"the request has more than {self.max_bytes} bytes, this server's limit;"
            " send smaller images",
        )

    async def _receive(self, request: Request, upload: Upload) -> None:
        try:
            async with asyncio.timeout(UPLOAD_SECONDS) as upload.timeout:
                async for block in request.stream():
                    upload.data += block
                    if len(upload.data) > self.max_bytes:
                        raise self._build_size_error()
                    self._make_room(upload)
        except ClientDisconnect:
            raise APIError(499, "the client left before its request had arrived") from None
        except TimeoutError:
            raise APIError(
                408,
                f"the request did not arrive within {UPLOAD_SECONDS:.0f} seconds, or this server"
                " has too many that arrive slowly; send it again",
            ) from None
        finally:
            upload.timeout = None

    def _make_room(self, newest: Upload) -> None:
        """Cut uploads off until all bodies fit into memory."""
        limit = MAX_BODIES * self.max_bytes
        while sum(len(upload.data) for upload in self.uploads) > limit:
            victim = self._choose_victim()
            if victim is None or victim is newest:
                raise build_busy_error(
                    "the requests that this server reads fill its memory; try again in a moment"
                )
            self.uploads.pop(victim)
            victim.timeout.reschedule(0)  # ends it now

    def _choose_victim(self) -> Upload | None:
        held: Counter = Counter()
        for upload in self.uploads:
            held[upload.address] += len(upload.data)
        unfinished = [upload for upload in self.uploads if upload.timeout is not None]
        # The first of several is the oldest.
        return max(unfinished, key=lambda upload: held[upload.address], default=None)
