"""Images from elsewhere: from public addresses alone, within bytes, pixels and seconds."""

import io
import ipaddress
import shutil
import socket
import ssl
import struct
import subprocess
import threading
import time
import zlib
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from PIL import Image

from sparsecut.schema import UserError
from sparsecut.serving import image_fetching
from sparsecut.serving.image_fetching import (
    ImageLimits,
    decode_image,
    fetch,
    fetch_all,
    find_public_address,
    read_image,
)
from sparsecut.serving.public_addresses import is_public

LIMITS = ImageLimits(remote=True, max_bytes=5000, max_pixels=900, seconds=0.3)


def make_png(width: int, height: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), "red").save(file, "PNG")
    return file.getvalue()


class Site(BaseHTTPRequestHandler):
    """An image, redirects that end and that do not, too many bytes, and too slow ones."""

    def do_GET(self):
        name = self.path.strip("/").split("?")[0]
        if name.startswith("hop"):
            num_left = int(name[3:])
            self.redirect(302, f"/hop{num_left - 1}" if num_left else "/good")
        elif name == "inward":
            self.redirect(301, "http://169.254.169.254/latest/meta-data")
        elif name == "trickle":  # a status line without an end
            self.send_blocks(b"H", seconds=0.1)
        elif name == "good":
            self.start()
            self.wfile.write(make_png(20, 10))
        elif name == "large":
            self.start()
            self.send_blocks(b"0" * 1000, seconds=0)
        elif name == "slow":
            self.start()
            self.send_blocks(b"0", seconds=0.1)
        else:
            self.send_error(404)

    def start(self):
        self.send_response(200)
        self.end_headers()

    def redirect(self, status: int, location: str):
        self.send_response(status)
        self.send_header("Location", location)
        self.end_headers()

    def send_blocks(self, block: bytes, seconds: float):
        for _ in range(40):
            self.wfile.write(block)
            time.sleep(seconds)

    def log_message(self, *arguments):
        pass


@contextmanager
def run_site(context: ssl.SSLContext | None = None):
    """The port of a running site."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Site)
    server.handle_error = lambda *arguments: None  # the client hangs up, as it should
    if context is not None:
        server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
    yield server.server_port
    server.shutdown()
    server.server_close()


@pytest.fixture
def site(monkeypatch):
    """The site's URL; its address alone counts as public."""
    is_public = image_fetching.is_public
    monkeypatch.setattr(
        image_fetching,
        "is_public",
        lambda address: str(address) == "127.0.0.1" or is_public(address),
    )
    with run_site() as port:
        yield f"http://127.0.0.1:{port}"


PRIVATE = [
    "127.0.0.1",
    "10.1.2.3",
    "192.168.0.1",
    "172.16.5.5",
    "169.254.169.254",
    "0.0.0.0",
    "100.64.0.1",
    "224.0.0.1",
    "255.255.255.255",
    "::1",
    "fe80::1",
    "fc00::1",
    "ff02::1",
    "::",
    "::ffff:10.0.0.1",
    "64:ff9b::7f00:1",
    "2002:7f00:1::",
    "2001:0:1::1",
    "::127.0.0.1",
    "::ffff:0:127.0.0.1",
    "64:ff9b:1::7f00:1",
    "localhost",
    "2130706433",
    "0x7f.1",
]


@pytest.mark.parametrize("host", PRIVATE)
def test_private_addresses_are_refused_however_they_are_written(host):
    with pytest.raises(UserError) as error:
        find_public_address(host, 80)
    assert host in str(error.value)
    url = f"http://[{host}]/a.png" if ":" in host else f"http://{host}/a.png"
    with pytest.raises(UserError) as error:
        read_image(url, LIMITS)
    assert host in str(error.value)


# IANA's registries of special-purpose addresses: the first and last of every range, and neighbours
# that are public.
SPECIAL_RANGES = [
    "0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12",
    "192.0.0.0/24", "192.0.0.0/29", "192.0.0.8/32", "192.0.0.9/32", "192.0.0.10/32",
    "192.0.0.170/31", "192.0.2.0/24", "192.31.196.0/24", "192.52.193.0/24", "192.88.99.0/24",
    "192.168.0.0/16", "192.175.48.0/24", "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24",
    "224.0.0.0/4", "240.0.0.0/4", "255.255.255.255/32",
    "::/128", "::1/128", "::/96", "64:ff9b::/96", "64:ff9b:1::/48", "100::/64", "100:0:0:1::/64",
    "2001::/23", "2001::/32", "2001:1::1/128", "2001:1::2/128", "2001:1::3/128", "2001:2::/48",
    "2001:3::/32", "2001:4:112::/48", "2001:10::/28", "2001:20::/28", "2001:30::/28",
    "2001:db8::/32", "2002::/16", "2620:4f:8000::/48", "3fff::/20", "5f00::/16", "fc00::/7",
    "fe80::/10", "fec0::/10", "ff00::/8", "::ffff:10.0.0.0/104", "::ffff:192.0.0.0/120",
    "::ffff:0:0:0/96",
]  # fmt: skip
PUBLIC = [
    "1.1.1.1", "9.255.255.255", "11.0.0.0", "100.63.255.255", "100.128.0.0", "126.255.255.255",
    "128.0.0.0", "172.15.255.255", "172.32.0.0", "191.255.255.255", "192.0.1.0", "192.0.3.0",
    "192.167.255.255", "192.169.0.0", "198.17.255.255", "198.20.0.0", "223.255.255.255",
    "2001:200::1", "2001:dc0::1", "2003::1", "2400::1", "2606:4700::1111", "2a00::1",
    "3ffe::1", "::ffff:8.8.8.8",
]  # fmt: skip


def test_every_special_range_is_refused_and_its_neighbours_are_not():
    for text in SPECIAL_RANGES:
        network = ipaddress.ip_network(text)
        for address in (network[0], network[-1], network[network.num_addresses // 2]):
            assert not is_public(address), (text, address)
    for text in PUBLIC:
        assert is_public(ipaddress.ip_address(text)), text


def test_an_ipv4_address_inside_an_ipv6_one_is_refused():
    inner = "7f00:1"
    for text in (f"2002:{inner}::1", f"64:ff9b::{inner}", f"2001:0:{inner}::", f"::{inner}",
                 f"::ffff:{inner}", f"::ffff:0:{inner}", f"2a00::5efe:{inner}",
                 f"2a00::200:5efe:{inner}"):  # fmt: skip
        assert not is_public(ipaddress.ip_address(text)), text


def test_a_slow_look_up_ends_with_the_time_of_its_image(monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: time.sleep(5))
    start = time.monotonic()
    with pytest.raises(UserError, match=r"slow\.example"):
        fetch("http://slow.example/a.png", LIMITS)
    assert time.monotonic() - start < 2


def test_all_images_of_a_request_share_its_time_and_bytes(site):
    assert len(fetch_all([f"{site}/good", f"{site}/good?2"], LIMITS)) == 2
    size = len(make_png(20, 10))
    with pytest.raises(UserError, match="bytes"):
        fetch_all([f"{site}/good", f"{site}/good?2"], replace(LIMITS, max_bytes=2 * size - 1))
    start = time.monotonic()
    with pytest.raises(UserError, match="too long"):
        fetch_all([f"{site}/slow?{i}" for i in range(8)], LIMITS)
    assert time.monotonic() - start < 2


def test_public_addresses_are_taken():
    assert find_public_address("93.184.215.14", 80) == "93.184.215.14"
    assert find_public_address("2606:2800:21f:cb07:6820:80da:af6b:8b2c", 443).startswith("2606")


def test_one_private_address_among_public_ones_is_enough(monkeypatch):
    addresses = ("93.184.215.14", "10.0.0.1")
    entries = [(2, 1, 6, "", (address, 80)) for address in addresses]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: entries)
    with pytest.raises(UserError, match=r"10\.0\.0\.1"):
        fetch("http://both.example/a.png", LIMITS)


def test_the_connection_goes_to_the_address_that_was_checked(site, monkeypatch):
    port = int(site.rsplit(":", 1)[1])
    hosts = []

    def look_up(host, *args, **kwargs):
        hosts.append(host)
        address = "127.0.0.1" if len(hosts) == 1 else "10.0.0.1"
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))]

    create_connection = socket.create_connection

    def connect(address, **kwargs):
        assert address[0] == "127.0.0.1"
        monkeypatch.undo()
        return create_connection(address, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    monkeypatch.setattr(image_fetching, "is_public", lambda address: True)
    monkeypatch.setattr(socket, "create_connection", connect)
    assert fetch(f"http://turning.example:{port}/good", LIMITS) == make_png(20, 10)
    assert hosts == ["turning.example"]


def test_a_remote_image_is_fetched_over_some_redirects(site):
    assert read_image(f"{site}/hop2?a=b c", LIMITS).size == (20, 10)


def test_a_remote_image_needs_permission(site):
    with pytest.raises(UserError, match="--remote"):
        read_image(f"{site}/good", ImageLimits())


REFUSED = {
    "inward": "169.254.169.254",
    "hop9": "3 times",
    "large": "5000 bytes",
    "slow": "took too long",
    "trickle": "took too long",
    "nothing": "404",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_too_much_or_leads_inward_is_refused(site, name):
    start = time.monotonic()
    with pytest.raises(UserError, match=REFUSED[name]):
        read_image(f"{site}/{name}", LIMITS)
    assert time.monotonic() - start < 3


BAD_URLS = [
    "",
    "/etc/passwd",
    "ftp://1.1.1.1/a",
    "http://",
    "http://a:b@1.1.1.1/",
    "http://1.1.1.1:x/",
    "http://1.1.1.1:99999/",
    "http://[1/",
    "http://a\0b/",
    "http://.example/",
    "http://1.1.1.1/\ud83d",
]


@pytest.mark.parametrize("url", BAD_URLS)
def test_what_is_no_url_of_an_image_is_refused(url):
    with pytest.raises(UserError, match="image"):
        read_image(url, LIMITS)


def test_an_image_is_refused_by_its_size_before_it_is_read(monkeypatch):
    monkeypatch.setattr(image_fetching, "open_upright", None)  # reading it would fail
    with pytest.raises(UserError, match="31 x 30") as error:
        decode_image(make_png(31, 30), LIMITS)
    assert "900" in str(error.value)
    with pytest.raises(UserError, match="5001") as error:
        decode_image(b"0" * 5001, LIMITS)
    assert "5000" in str(error.value)


def make_zip_bomb() -> bytes:
    """A PNG file of two thousand bytes with two megabytes of text."""
    png = make_png(20, 20)
    text = b"zTXt" + b"a\0\0" + zlib.compress(b"a" * 2_000_000)
    length = struct.pack(">I", len(text) - 4)
    checksum = struct.pack(">I", zlib.crc32(text))
    return png[:33] + length + text + checksum + png[33:]


BROKEN_FILES = {
    "empty": b"",
    "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
    "cut": make_png(20, 20)[:60],
    "bomb": make_zip_bomb(),
}


@pytest.mark.parametrize("name", BROKEN_FILES)
def test_broken_files_and_other_formats_are_refused(name):
    with pytest.raises(UserError, match="PNG, JPEG"):
        decode_image(BROKEN_FILES[name], LIMITS)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")
def test_https_needs_a_certificate_of_that_host(tmp_path, monkeypatch):
    certificate = tmp_path / "cert.pem"
    key = tmp_path / "key.pem"
    settings = (
        "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 1"
        " -subj /CN=images.example -addext subjectAltName=DNS:images.example"
    )
    command = ["openssl", *settings.split(), "-keyout", key, "-out", certificate]
    subprocess.run(command, check=True, capture_output=True)
    server_context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server_context.load_cert_chain(certificate, key)
    monkeypatch.setattr(image_fetching, "find_public_address", lambda *target: "127.0.0.1")
    with run_site(server_context) as port:
        url = f"https://images.example:{port}/good"
        with pytest.raises(UserError, match=r"self.signed"):
            fetch(url, LIMITS)
        trusting = ssl.create_default_context(cafile=certificate)
        monkeypatch.setattr(ssl, "create_default_context", lambda: trusting)
        assert fetch(url, LIMITS) == make_png(20, 10)
        with pytest.raises(UserError, match="mismatch"):
            fetch(url.replace("images", "others"), LIMITS)
        with pytest.raises(UserError, match="took too long"):
            fetch(url.replace("good", "slow"), LIMITS)
