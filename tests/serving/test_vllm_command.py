"""`sparsecut serve --engine vllm`, as typed; vLLM's server itself is not started."""

import json
import os

import pytest
from helpers.tiny import SPARSE, tiny_llava, tiny_model

from sparsecut import upgrade
from sparsecut.building import save
from sparsecut.cli import main as cli
from sparsecut.cli import serve_vllm
from sparsecut.schema import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vllm_serve") / "cats" / "final"
    save(*tiny_model(), folder)
    return folder


@pytest.fixture
def started(monkeypatch):
    """The command lines with which vLLM would have been started."""
    commands = []
    monkeypatch.setattr(serve_vllm, "check_installed", lambda: None)
    monkeypatch.setattr(
        serve_vllm.run_vllm, "__kwdefaults__", {"execute": lambda _, line: commands.append(line)}
    )
    monkeypatch.delenv(serve_vllm.KEY_VARIABLE, raising=False)
    return commands


def run(*arguments) -> None:
    """Run the command, which returns instead of becoming vLLM's server."""
    with pytest.raises(SystemExit) as exit:
        cli.app(["serve", *map(str, arguments)])
    assert not exit.value.code


def refuse(match: str, *arguments) -> None:
    """Run the command, which must refuse, and say so."""
    with pytest.raises(UserError, match=match):
        cli.app(["serve", *map(str, arguments)])


def read_options(command: list[str]) -> dict[str, str]:
    """The options of vLLM's command line by name."""
    start = command.index("--model") + 2
    return dict(zip(command[start::2], command[start + 1 :: 2], strict=True))


def test_the_defaults_are_ours(folder, started):
    run(folder, "--engine", "vllm", "--port", 8123, "--token", "secret")
    (command,) = started
    options = read_options(command)
    assert command[command.index("--model") + 1] == str(folder)
    assert options["--host"] == "127.0.0.1" and options["--port"] == "8123"
    assert options["--served-model-name"] == "cats"
    assert options["--dtype"] == "float32"  # as saved
    assert json.loads(options["--limit-mm-per-prompt"]) == {"image": 8}
    assert json.loads(options["--override-generation-config"]) == {"max_new_tokens": 1024}
    assert os.environ[serve_vllm.KEY_VARIABLE] == "secret" and "secret" not in command


def test_options_of_vllm_follow_two_dashes_and_replace_ours(folder, started):
    run(
        folder, "--engine", "vllm", "--port", 8123, "--", "--dtype", "bfloat16", "--max-num-seqs", 4
    )
    options = read_options(started[0])
    assert options["--dtype"] == "bfloat16" and options["--max-num-seqs"] == "4"
    assert started[0].count("--dtype") == 1


@pytest.mark.parametrize("option", [["--ui"], ["--remote"], ["--queue", "3"], ["--device", "cpu"]])
def test_options_that_vllm_lacks(folder, started, option):
    refuse(option[0], folder, "--engine", "vllm", *option)
    assert not started


def test_an_unknown_engine_and_arguments_for_the_wrong_one(folder):
    refuse("vllm", folder, "--engine", "vlm")
    refuse("--engine vllm", folder, "--", "--dtype", "bfloat16")


def test_vllm_that_is_not_installed(folder, monkeypatch):
    monkeypatch.setattr("sparsecut.serving.vllm.command.find_spec", lambda name: None)
    refuse(r"sparsecut\[vllm\]", folder, "--engine", "vllm", "--port", 8124)


def test_a_model_that_vllm_cannot_serve(tmp_path, started):
    save(*tiny_model({**SPARSE, "gate": "context"}), tmp_path / "gated")
    refuse("context", tmp_path / "gated", "--engine", "vllm", "--port", 8125)
    assert not started


@pytest.fixture(scope="module")
def upgraded(tmp_path_factory):
    """(folder of a whole upgraded model, folder of its shortcuts alone)."""
    folder = tmp_path_factory.mktemp("vllm_upgrades")
    base, processor = tiny_llava()
    base.save_pretrained(folder / "base")
    processor.save_pretrained(folder / "base")
    model, processor = upgrade(folder / "base", "sparsecut")
    save(model, processor, folder / "whole")
    model.save_fusion(folder / "shortcuts")
    return folder / "whole", folder / "shortcuts"


def test_an_upgraded_model(upgraded, started):
    run(upgraded[0], "--engine", "vllm", "--port", 8126)
    assert read_options(started[0])["--dtype"] == "float32"


def test_shortcuts_alone_are_no_model_for_vllm(upgraded, started):
    refuse("save_pretrained", upgraded[1], "--engine", "vllm", "--port", 8127)
    assert not started
