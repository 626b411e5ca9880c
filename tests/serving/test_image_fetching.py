"""Pictures from elsewhere: only from public addresses, redirects included, within bytes, pixels and
seconds.
"""

import io
import shutil
import socket
import ssl
import struct
import subprocess
import threading
import time
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from PIL import Image

from sparsecut.serving import image_fetching as fetching
from sparsecut.serving.image_fetching import (
    ImageLimits,
    fetch,
    picture_in,
    picture_of,
    public_address,
)

ALLOWED = ImageLimits(remote=True, max_bytes=5000, max_pixels=900, seconds=0.5)


def png(*size: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, "red").save(file, "PNG")
    return file.getvalue()


class Site(BaseHTTPRequestHandler):
    """A picture, redirects that end and that do not, too much, and too slow."""

    def do_GET(self):
        name = self.path.strip("/").split("?")[0]
        if name.startswith("hop"):
            left = int(name[3:])
            self.send_response(302)
            self.send_header("Location", f"/hop{left - 1}" if left else "/good")
            self.end_headers()
        elif name == "inward":
            self.send_response(301)
            self.send_header("Location", "http://169.254.169.254/latest/meta-data")
            self.end_headers()
        elif name == "trickle":  # a status line without an end
            for _ in range(40):
                self.wfile.write(b"H")
                time.sleep(0.1)
        elif name in ("good", "large", "slow"):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(png(20, 10) if name == "good" else b"")
            for _ in range(40 if name != "good" else 0):
                self.wfile.write(b"0" * (1000 if name == "large" else 1))
                time.sleep(0.1 if name == "slow" else 0)
        else:
            self.send_error(404)

    def log_message(self, *args):
        pass


@pytest.fixture
def site(monkeypatch):
    """The site's address, which alone counts as public."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Site)
    server.handle_error = lambda *args: None  # the client hung up, as it should
    threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
    real = fetching._is_public
    monkeypatch.setattr(
        fetching, "_is_public", lambda address: str(address) == "127.0.0.1" or real(address)
    )
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


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
    with pytest.raises(ValueError, match=r"not a public one|not known"):
        public_address(host, 80)
    url = f"http://[{host}]/a.png" if ":" in host else f"http://{host}/a.png"
    with pytest.raises(ValueError, match=r"not a public one|not known"):
        picture_of(url, ALLOWED)


def test_public_addresses_are_taken():
    assert public_address("93.184.215.14", 80) == "93.184.215.14"
    assert public_address("2606:2800:21f:cb07:6820:80da:af6b:8b2c", 443).startswith("2606")


def test_one_private_address_among_public_ones_is_enough(monkeypatch):
    found = [(2, 1, 6, "", (address, 80)) for address in ("93.184.215.14", "10.0.0.1")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: found)
    with pytest.raises(ValueError, match=r"10\.0\.0\.1, which is not a public one"):
        fetch("http://both.example/a.png", ALLOWED)


def test_the_connection_goes_to_the_address_that_was_checked(site, monkeypatch):
    port, asked = int(site.rsplit(":", 1)[1]), []

    def look_up(host, *args, **kwargs):
        asked.append(host)
        address = "127.0.0.1" if len(asked) == 1 else "10.0.0.1"
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))]

    real = socket.create_connection

    def connect(address, **kwargs):
        assert address[0] == "127.0.0.1"
        monkeypatch.undo()
        return real(address, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    monkeypatch.setattr(fetching, "_is_public", lambda address: True)
    monkeypatch.setattr(socket, "create_connection", connect)
    assert fetch(f"http://turning.example:{port}/good", ALLOWED) == png(20, 10) and asked == [
        "turning.example"
    ]


def test_a_remote_picture_is_fetched_over_some_redirects(site):
    assert picture_of(f"{site}/hop2?a=b c", ALLOWED).size == (20, 10)


REFUSED = {
    "inward": "169.254.169.254, which is not a public one",
    "hop9": "more than 3 times",
    "large": "more than the 5000 bytes",
    "slow": "it took too long",
    "trickle": "it took too long",
    "nothing": "the answer was 404",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_too_much_or_leads_inward_is_refused(site, name):
    began = time.monotonic()
    with pytest.raises(ValueError, match=REFUSED[name]):
        picture_of(f"{site}/{name}", ALLOWED)
    assert time.monotonic() - began < 3


@pytest.mark.parametrize(
    "url",
    ["ftp://1.1.1.1/a", "/etc/passwd", "http://", "http://a:b@1.1.1.1/", "http://1.1.1.1:x/", ""],
)
def test_what_is_no_url_of_a_picture_is_refused(url):
    with pytest.raises(ValueError, match=r"give one as|neither a data URL"):
        picture_of(url, ALLOWED)


def test_a_picture_is_refused_by_its_size_before_it_is_read(monkeypatch):
    monkeypatch.setattr(fetching, "open_upright", None)  # reading it would fail
    with pytest.raises(ValueError, match="31 x 30 pixels"):
        picture_in(png(31, 30), ALLOWED)
    with pytest.raises(ValueError, match="takes 5000"):
        picture_in(b"0" * 5001, ALLOWED)


def test_broken_files_and_other_formats_are_refused():
    whole = png(20, 20)
    text = (
        b"zTXt" + b"a\0\0" + zlib.compress(b"a" * 2_000_000)
    )  # two megabytes in two thousand bytes
    bomb = (
        whole[:33]
        + struct.pack(">I", len(text) - 4)
        + text
        + struct.pack(">I", zlib.crc32(text))
        + whole[33:]
    )
    for data in (b"", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", whole[:60], bomb):
        with pytest.raises(ValueError, match="cannot be read"):
            picture_in(data, ALLOWED)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")
def test_https_needs_a_certificate_of_that_host(site, tmp_path, monkeypatch):
    settings = (
        "req -x509 -newkey rsa:2048 -nodes -days 1 -subj /CN=pictures.example -addext"
        " subjectAltName=DNS:pictures.example"
    )
    files = ["-keyout", tmp_path / "key.pem", "-out", tmp_path / "cert.pem"]
    subprocess.run(["openssl", *settings.split(), *files], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Site)
    server.handle_error = lambda *args: None
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
    monkeypatch.setattr(fetching, "public_address", lambda host, port: "127.0.0.1")
    url = f"https://pictures.example:{server.server_port}/good"
    with pytest.raises(ValueError, match=r"self.signed"):
        fetch(url, ALLOWED)
    trusting = ssl.create_default_context(cafile=tmp_path / "cert.pem")
    monkeypatch.setattr(ssl, "create_default_context", lambda: trusting)
    assert fetch(url, ALLOWED) == png(20, 10)
    with pytest.raises(ValueError, match="mismatch"):
        fetch(url.replace("pictures", "others"), ALLOWED)
    with pytest.raises(ValueError, match="took too long"):
        fetch(url.replace("good", "slow"), ALLOWED)
    server.shutdown()
    server.server_close()
