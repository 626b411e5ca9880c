"""Pages of other sites, and other names for this server, are kept out; honest clients are not."""

import base64
import hashlib
import json
import re
import urllib.request
from http.client import HTTPConnection

import pytest
from helpers.clients import complete, make_messages, openai, start_server

from sparsecut.cli import main as cli
from sparsecut.schema import UserError
from sparsecut.serving.gate import HostNames
from sparsecut.serving.web import add_page, read_page

BODY = json.dumps({"messages": make_messages("red"), "max_tokens": 1}).encode()
JSON = {"Content-Type": "application/json"}


def send(client, path: str = "/v1/chat/completions", body: bytes | None = BODY, **headers):
    """Status and headers of the response to a request with these headers and no others."""
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    names.setdefault("Host", f"127.0.0.1:{client.base_url.port}")
    connection = HTTPConnection("127.0.0.1", client.base_url.port)
    method = "POST" if body is not None else "GET"
    connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
    for name, value in names.items():
        for one in value if isinstance(value, list) else [value]:
            connection.putheader(name, one)
    if body is not None:
        connection.putheader("Content-Length", str(len(body)))
    connection.endheaders(body)
    response = connection.getresponse()
    response.read()
    connection.close()
    return response.status, response.headers


FOREIGN_TYPES = [
    None,
    "",
    "text/plain",
    "text/plain;application/json",
    "text/plain; charset=application/json",
    "multipart/form-data; boundary=application/json",
    "application/x-www-form-urlencoded",
    "application/json, text/plain",
    "text/plain, application/json",
    "application/jsonp",
    "xapplication/json",
]


@pytest.mark.parametrize("content_type", FOREIGN_TYPES)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/sparsecut/strengths"])
def test_other_media_types_are_refused(engine, client, content_type, path):
    before = engine.counts["batches"]
    headers = {} if content_type is None else {"Content_Type": content_type}
    assert send(client, path, **headers)[0] == 415
    assert engine.counts["batches"] == before


OWN_TYPES = ["application/json", "Application/JSON; charset=utf-8", "application/json ;a=b"]


@pytest.mark.parametrize("content_type", OWN_TYPES)
def test_json_is_taken_with_its_parameters(client, content_type):
    assert send(client, Content_Type=content_type)[0] == 200


FOREIGN_HOSTS = [
    "evil.example",
    "evil.example:8000",
    "127.0.0.1.evil.example",
    "localhost.evil.example",
    "evil.example@127.0.0.1",
    "127.0.0.1@evil.example",
    "127.0.0.1:80:80",
    "127.0.0.1/",
    "xlocalhost",
    "[::1",
]


@pytest.mark.parametrize("host", FOREIGN_HOSTS)
def test_other_names_of_this_server_are_refused(client, host):
    for path, body in (
        ("/v1/chat/completions", BODY),
        ("/", None),
        ("/metrics", None),
        ("/health", None),
        ("/sparsecut/plan", None),
    ):
        assert send(client, path, body, Host=host, **{"Content-Type": "application/json"})[0] == 403
    try:
        status, _ = send(client, Host=["127.0.0.1", host], **JSON)
    except ConnectionError:  # refused before its body was read
        status = 400
    assert status in (400, 403)


OWN_HOSTS = [
    "127.0.0.1",
    "127.0.0.1:8000",
    "localhost",
    "LOCALHOST:8000",
    "localhost.",
    "api.localhost:1",
    "[::1]:8000",
    "[::1]",
    "[fe80::1]:8000",
    "192.168.1.5:8000",
    "8.8.8.8",
    "2130706433.localhost",
]


@pytest.mark.parametrize("host", OWN_HOSTS)
def test_addresses_and_localhost_are_taken(client, host):
    assert send(client, Host=host, **JSON)[0] == 200
    assert send(client, Host=host, Origin=f"http://{host}", **JSON)[0] == 200


FOREIGN_ORIGINS = [
    "https://evil.example",
    "null",
    "file://",
    "http://127.0.0.1:1",
    "http://localhost:3000",
    "http://127.0.0.1.evil.example",
    "http://evil.example@127.0.0.1",
    "http://[",
    "",
]


@pytest.mark.parametrize("origin", FOREIGN_ORIGINS)
def test_pages_of_other_origins_are_refused(engine, client, origin):
    before = engine.counts["batches"]
    for path in ("/v1/chat/completions", "/sparsecut/strengths"):
        assert send(client, path, Origin=origin, **JSON)[0] == 403
    host = f"127.0.0.1:{client.base_url.port}"
    assert send(client, Origin=[f"http://{host}", origin], **JSON)[0] == 403
    assert engine.counts["batches"] == before


def test_a_browser_may_not_ask_whether_it_may(client):
    connection = HTTPConnection("127.0.0.1", client.base_url.port)
    headers = {"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}
    connection.request("OPTIONS", "/v1/chat/completions", headers=headers)
    response = connection.getresponse()
    assert response.status in (403, 405)
    assert not [name for name in response.headers if name.lower().startswith("access-control")]


def test_a_name_that_is_allowed_is_taken(engine):
    with start_server(engine, add_page, allowed_hosts=("model.example.org",)) as client:
        assert send(client, Host="Model.example.org", **JSON)[0] == 200
        origin = "https://model.example.org"
        assert send(client, Host="model.example.org", Origin=origin, **JSON)[0] == 200
        # A proxy that sends the address it calls, as nginx does by default.
        assert send(client, Origin=origin, **JSON)[0] == 200
        assert send(client, Host="model.example.org:443", Origin=origin, **JSON)[0] == 200
        assert send(client, Host="other.example.org", **JSON)[0] == 403
        assert send(client, Origin="https://other.example.org", **JSON)[0] == 403
        assert complete(client, make_messages("red"), max_tokens=1).choices
    with start_server(engine, allowed_hosts=("*",)) as client:
        assert send(client, Host="other.example.org", Origin="https://a.b", **JSON)[0] == 200


def test_clients_without_a_browser_are_taken(client):
    url = str(client.base_url) + "chat/completions"
    request = urllib.request.Request(url, BODY, JSON)  # as curl would
    with urllib.request.urlopen(request) as response:
        assert json.load(response)["choices"]
    assert complete(client, make_messages("red"), max_tokens=1).choices
    with pytest.raises(openai.BadRequestError):
        complete(client, [])


def test_this_machines_own_name_is_taken(monkeypatch):
    monkeypatch.setattr("socket.gethostname", lambda: "GPU-box")
    names = HostNames()
    assert names.allows_host("gpu-box:8000")
    assert names.allows_host("gpu-box.local")
    assert not names.allows_host("gpu-box.evil.example:8000")


def test_every_response_forbids_guessing_its_type(client):
    for path in ("/", "/metrics", "/v1/models", "/nothing"):
        _, headers = send(client, path, None)
        assert headers["x-content-type-options"] == "nosniff"
    _, headers = send(client, "/", None)
    policy = headers["content-security-policy"]
    script = re.search("<script>(.*)</script>", read_page(), re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy
    for rule in ("default-src 'none'", "frame-ancestors 'none'", "base-uri 'none'", "form-action"):
        assert rule in policy


@pytest.mark.parametrize("name", ["http://a.b", "a.b:80", "", "a b", "*.a.b", "a/b"])
def test_an_allowed_host_is_a_name_alone(tmp_path, name):
    with pytest.raises(UserError) as error:
        cli.app(["serve", str(tmp_path), "--allowed-host", name])
    assert repr(name) in str(error.value)
