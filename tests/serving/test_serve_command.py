"""`sparsecut serve`, as typed."""

import json
import socket
import threading
import urllib.request

import pytest
from helpers.clients import uvicorn
from helpers.tiny import tiny_model

from sparsecut.building import save
from sparsecut.cli import main as cli


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("serve") / "cats" / "final"
    save(*tiny_model(), folder)
    return folder


@pytest.fixture
def asked(monkeypatch):
    """What a client sees of the server that the command starts, which then ends."""
    seen, run = {}, uvicorn.Server.run

    def serve_two(server, sockets):
        thread = threading.Thread(target=run, args=[server, sockets], daemon=True)
        thread.start()
        root = f"http://127.0.0.1:{sockets[0].getsockname()[1]}"
        for path in ("/v1/models", "/"):
            request = urllib.request.Request(
                root + path, headers={"Authorization": "Bearer secret"}
            )
            with urllib.request.urlopen(request) as response:
                seen[path] = response.read().decode()
        server.should_exit = True
        thread.join()

    monkeypatch.setattr(uvicorn.Server, "run", serve_two)
    return seen


def serve(*arguments: str) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.app(["serve", *arguments])
    assert not ended.value.code


def test_a_saved_model_is_served_under_its_name_with_its_page(folder, asked, capsys, monkeypatch):
    monkeypatch.setenv("SPARSECUT_TOKEN", "secret")
    serve(str(folder), "--port", "0", "--ui", "--device", "cpu")
    assert json.loads(asked["/v1/models"])["data"][0]["id"] == "cats"
    assert (
        "<title>SparseCut" in asked["/"]
        and "cats answers at http://127.0.0.1:" in capsys.readouterr().out
    )


def test_a_server_for_every_network_without_a_token_is_warned_of(
    folder, asked, capsys, monkeypatch
):
    monkeypatch.delenv("SPARSECUT_TOKEN", raising=False)
    monkeypatch.setattr("sparsecut.cli.serve._is_local", lambda host: False)
    monkeypatch.setattr("sparsecut.serving.web.page", lambda: "none")
    serve(str(folder), "--port", "0", "--ui", "--name", "mine", "--device", "cpu")
    assert json.loads(asked["/v1/models"])["data"][0]["id"] == "mine" and asked["/"] == "none"
    assert "anyone who reaches 127.0.0.1 can ask" in capsys.readouterr().err


def test_a_port_in_use_and_what_cannot_be_sent_are_refused(folder):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ValueError, match="cannot be listened at"):
            cli.app(["serve", str(folder), "--port", str(taken.getsockname()[1])])
    with pytest.raises(ValueError, match="no HTTP header can carry"):
        cli.app(["serve", str(folder), "--token", "a b"])
    for name in ("", "a\r\nX-Mine: b"):
        with pytest.raises(ValueError, match="empty or holds line breaks"):
            cli.app(["serve", str(folder), "--name", name])
