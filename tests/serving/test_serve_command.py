"""`sparsecut serve`, as typed."""

import base64
import json
import socket
import threading
import urllib.request

import pytest
from helpers.clients import uvicorn
from helpers.tiny import tiny_model

from sparsecut.building import save
from sparsecut.cli import main as cli
from sparsecut.schema import UserError
from sparsecut.shapes import EXAMPLE_IMAGE, EXAMPLE_QUESTIONS


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("serve") / "cats" / "final"
    save(*tiny_model(), folder)
    return folder


@pytest.fixture
def responses(monkeypatch):
    """What a client reads from the server that the command starts, which then ends."""
    texts = {}
    run = uvicorn.Server.run

    def serve_two_requests(server, sockets):
        thread = threading.Thread(target=run, args=[server, sockets], daemon=True)
        thread.start()
        root = f"http://127.0.0.1:{sockets[0].getsockname()[1]}"
        for path in ("/v1/models", "/", "/sparsecut/plan"):
            headers = {"Authorization": "Bearer secret"}
            request = urllib.request.Request(root + path, headers=headers)
            with urllib.request.urlopen(request) as response:
                texts[path] = response.read().decode()
        server.should_exit = True
        thread.join()

    monkeypatch.setattr(uvicorn.Server, "run", serve_two_requests)
    return texts


def serve(*arguments: str) -> None:
    with pytest.raises(SystemExit) as exit:
        cli.app(["serve", *arguments, "--device", "cpu"])
    assert not exit.value.code


def test_without_a_model_the_shipped_one_is_served_and_its_page_offers_the_example(responses):
    serve("--port", "0", "--ui")
    assert json.loads(responses["/v1/models"])["data"][0]["id"] == "shapes"
    offered = json.loads(responses["/sparsecut/plan"])["examples"]
    assert tuple(offered["questions"]) == EXAMPLE_QUESTIONS
    image = base64.b64decode(offered["image"].partition(",")[2])
    assert image == EXAMPLE_IMAGE.read_bytes()


def test_a_saved_model_is_served_under_its_name_with_its_page(
    folder, responses, capsys, monkeypatch
):
    monkeypatch.setenv("SPARSECUT_TOKEN", "secret")
    serve(str(folder), "--port", "0", "--ui")
    assert json.loads(responses["/v1/models"])["data"][0]["id"] == "cats"
    assert "<title>SparseCut" in responses["/"]
    assert json.loads(responses["/sparsecut/plan"])["examples"] is None
    output = capsys.readouterr()
    assert "cats answers at http://127.0.0.1:" in output.out


def test_a_server_for_every_network_without_a_token_prints_a_warning(
    folder, responses, capsys, monkeypatch
):
    monkeypatch.delenv("SPARSECUT_TOKEN", raising=False)
    monkeypatch.setattr("sparsecut.cli.serve._is_local", lambda host: False)
    monkeypatch.setattr("sparsecut.serving.web.read_page", lambda: "none")
    serve(str(folder), "--port", "0", "--ui", "--name", "mine")
    assert json.loads(responses["/v1/models"])["data"][0]["id"] == "mine"
    assert responses["/"] == "none"
    warning = capsys.readouterr().err
    assert "127.0.0.1" in warning
    assert "SPARSECUT_TOKEN" in warning


def test_a_port_in_use_is_refused(folder):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        with pytest.raises(UserError) as error:
            cli.app(["serve", str(folder), "--port", port])
    assert port in str(error.value)
    assert "--port" in str(error.value)


def test_a_token_or_name_that_cannot_be_sent_is_refused(folder):
    with pytest.raises(UserError, match="token"):
        cli.app(["serve", str(folder), "--token", "a b"])
    for name in ("", "a\r\nX-Mine: b"):
        with pytest.raises(UserError) as error:
            cli.app(["serve", str(folder), "--name", name])
        assert repr(name) in str(error.value)
