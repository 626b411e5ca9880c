"""The Dockerfile: its instructions can be read, what it copies exists, and its commands are ours.

No image is built here. A build needs a daemon and a registry of images.
"""

import json
import re
import shlex
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest
import typer

from sparsecut.cli.main import app

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "Dockerfile").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
KNOWN = {"ARG", "FROM", "WORKDIR", "COPY", "RUN", "USER", "ENV", "VOLUME", "EXPOSE"}
KNOWN |= {"HEALTHCHECK", "ENTRYPOINT", "CMD"}


def read_instructions() -> list[tuple[str, str]]:
    """(instruction, its text) of every instruction, with continued lines joined."""
    lines = [line for line in TEXT.splitlines() if line.strip() and not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [tuple(line.split(" ", 1)) for line in joined.splitlines()]


INSTRUCTIONS = read_instructions()


def get_all(name: str) -> list[str]:
    """The texts of all instructions of a name."""
    return [text for one, text in INSTRUCTIONS if one == name]


def test_every_instruction_is_known_and_the_first_names_an_image():
    assert {name for name, _ in INSTRUCTIONS} <= KNOWN
    names = [name for name, _ in INSTRUCTIONS if name != "ARG"]
    assert names[0] == "FROM" and names.count("FROM") == names.count("ENTRYPOINT") == 1
    version = re.search(r"PYTHON=([\d.]+)", TEXT)[1]
    assert f"Programming Language :: Python :: {version}" in PROJECT["classifiers"]


def test_what_is_copied_exists_and_is_sent():
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert "*" in lines
    sent = [line[1:] for line in lines if line.startswith("!")]
    copied = [source for text in get_all("COPY") for source in text.split()[:-1]]
    for source in copied:
        assert (ROOT / source).exists(), source
        assert any(fnmatch(source, pattern) for pattern in sent), f"{source} is not sent"
    assert set(sent) == set(copied)
    assert PROJECT["readme"] in copied and set(PROJECT["license-files"]) <= set(copied)


def test_every_argument_is_used_and_every_extra_exists():
    names = [text.split("=")[0] for text in get_all("ARG")]
    assert set(names) == {"PYTHON", "TORCH"}
    assert all(f"${{{name}}}" in TEXT for name in names)
    extras = re.search(r"'\.\[([\w,-]+)\]'", TEXT)[1].split(",")
    assert set(extras) <= set(PROJECT["optional-dependencies"])
    assert {"serve", "reports"} <= set(extras)


def test_commands_run_as_somebody_without_rights():
    order = [name for name, _ in INSTRUCTIONS]
    (user,) = get_all("USER")
    assert user not in ("root", "0")
    assert order.index("USER") > max(at for at, name in enumerate(order) if name == "RUN")
    assert f" {user}" in "".join(get_all("RUN"))


def test_its_health_is_the_servers():
    from fastapi.testclient import TestClient
    from helpers.tiny import tiny_model

    from sparsecut.serving.admission import ServerConfig
    from sparsecut.serving.engine import Engine
    from sparsecut.serving.server import make_app

    command = json.loads(get_all("HEALTHCHECK")[0].split("CMD", 1)[1])
    route = re.search(r"http://127\.0\.0\.1:(\d+)(/\w+)", command[-1])
    assert get_all("EXPOSE") == [route[1]]
    compile(command[-1], "HEALTHCHECK", "exec")
    engine = Engine(*tiny_model())
    client = TestClient(
        make_app(engine, ServerConfig(name="tiny", token="SECRET")),
        base_url="http://127.0.0.1:8000",
    )
    assert client.get(route[2]).status_code == 200
    engine.close()


@pytest.mark.parametrize("line", re.findall(r"^#\s+(docker run [^\n]+)", TEXT, re.M))
def test_the_commands_at_its_head_exist(line):
    (entry,) = json.loads(get_all("ENTRYPOINT")[0])
    assert entry in PROJECT["scripts"]
    words = shlex.split(line.split(" sparsecut ", 1)[1])
    command = typer.main.get_command(app).commands[words[0]]
    known = {option for parameter in command.params for option in parameter.opts}
    assert {word for word in words if word.startswith("--")} <= known
