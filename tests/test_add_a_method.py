"""docs/add-a-method.md to the letter: one class and one entry are enough for every command."""

import contextlib
import importlib.util
import io
import json
import re
import shlex
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
import torch

import sparsecut
from sparsecut import Plan, Shortcut
from sparsecut.cli.main import main
from sparsecut.methods import METHODS
from sparsecut.plan import GATES, MIXERS, Gate
from sparsecut.schema import UserError

PAGE = (Path(__file__).parents[1] / "docs" / "add-a-method.md").read_text()


def get_blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.S)


COMMANDS = "".join(get_blocks("bash")).splitlines()


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """A folder with the page's two files, and its parts known in this process."""
    folder = tmp_path_factory.mktemp("parts")
    file = folder / "my_parts.py"
    file.write_text(get_blocks("python")[0])
    (folder / "twice.yaml").write_text(get_blocks("yaml")[0])
    tables = (MIXERS, GATES, METHODS)
    before = [dict(table) for table in tables]
    spec = importlib.util.spec_from_file_location("my_parts", file)
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    yield folder
    for table, entries in zip(tables, before, strict=True):
        table.clear()
        table.update(entries)


def run(command: str, folder: Path) -> str:
    """What a command of the page prints, run in this process."""
    python, file, *arguments = shlex.split(command)
    assert (python, file) == ("python", "my_parts.py")
    output = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(output):
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["sparsecut", *arguments])
        patch.setattr(sys.stdout, "reconfigure", lambda **options: None, raising=False)
        with pytest.raises(SystemExit) as end:
            main()
    assert not end.value.code
    return output.getvalue()


@pytest.fixture(scope="module")
def outputs(parts):
    """What the page's commands print, by their verb; all but the server have run."""
    return {shlex.split(command)[2]: run(command, parts) for command in COMMANDS[:-1]}


def test_commands_know_the_parts(parts, outputs):
    assert list(outputs) == ["show", "shapes", "train", "explain", "chat"]
    assert MIXERS["weigh"].description in outputs["show"]
    assert GATES["tenth"].description in outputs["show"]
    assert "weigh" in outputs["explain"]
    assert outputs["chat"].strip()


def test_a_saved_model_has_the_parts_trained_and_names_those_that_are_not_known(
    parts, outputs, monkeypatch
):
    model, _ = sparsecut.load(parts / "runs/twice/final")
    assert model.fusion.paths[1].mixer.scores.any()
    assert not torch.equal(model.fusion.gates, torch.full((2,), 0.1))
    monkeypatch.delitem(MIXERS, "weigh")
    with pytest.raises(UserError, match="'weigh'"):
        sparsecut.load(parts / "runs/twice/final")


def test_the_servers_page_describes_the_parts(parts, outputs):
    pytest.importorskip("uvicorn")
    pytest.importorskip("fastapi")
    command = [sys.executable, *shlex.split(COMMANDS[-1])[1:], "--port", "0"]
    with subprocess.Popen(command, cwd=parts, stdout=subprocess.PIPE, text=True) as server:
        try:
            url = re.search(r"page is (http://\S+)", server.stdout.readline())[1]
            with urllib.request.urlopen(f"{url}sparsecut/plan") as answer:
                plan = json.load(answer)
        finally:
            server.terminate()
    assert plan["shortcuts"][1]["words"] == MIXERS["weigh"].description
    assert GATES["tenth"].description in plan["summary"]


def test_a_new_mixer_upgrades_a_pretrained_model(parts, llava):
    base, processor = llava
    shortcuts = (Shortcut((-2,), 0), Shortcut((1, 2), 1, "weigh"))
    model, _ = sparsecut.upgrade(base, Plan(shortcuts).to_dict(), processor=processor)
    assert model.fusion.paths[0].mixer.scores.shape == (2, 1)
    assert not model.fusion.paths[0].mixer.scores.any()


def test_a_gate_may_be_a_module(monkeypatch):
    class Half(torch.nn.Module):
        def __init__(self, num_shortcuts, language_dim):
            super().__init__()

        def forward(self, hidden, features, num_tokens):
            return features / 2

    monkeypatch.setitem(GATES, "half", Gate("half of everything", module=Half))
    shortcuts = (Shortcut((-2,), 0), Shortcut((1,), 1))
    plain = sparsecut.build("shapes", "shapes", plan=Plan(shortcuts).to_dict())[0]
    halved = sparsecut.build("shapes", "shapes", plan=Plan(shortcuts, gate="half").to_dict())[0]
    halved.load_state_dict(plain.state_dict())
    with torch.no_grad():
        plain.fusion.paths[1].linear_2.weight /= 2
        plain.fusion.paths[1].linear_2.bias /= 2
    token = plain.config.image_token_id
    inputs = {
        "input_ids": torch.full((1, plain.config.num_image_tokens), token),
        "pixel_values": torch.rand(1, *plain.grid.view),
    }
    torch.testing.assert_close(halved(**inputs).logits, plain(**inputs).logits)
