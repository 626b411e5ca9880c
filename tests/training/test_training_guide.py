"""docs/training.md, followed word for word: its data, its recipe, its commands and its files."""

import json
import re
import shlex
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from sparsecut.cli.main import app
from sparsecut.config.recipe import load_recipe
from sparsecut.config.shipped import find_deepspeed
from sparsecut.config.yaml_io import read_yaml
from sparsecut.shapes.questions import split_scene
from sparsecut.shapes.scenes import draw

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")


def find_blocks(kind: str) -> list[str]:
    """The page's blocks of code of one kind."""
    return re.findall(rf"```{kind}\n(.*?)```", GUIDE, re.S)


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    """A folder as the guide has its reader make it."""
    images = tmp_path / "mine"
    images.mkdir()
    for i in range(2):
        draw(split_scene(f"test/{i}/0")).save(images / f"{i}.png")
    (images / "data.json").write_text(find_blocks("json")[0])
    (tmp_path / "mine.yaml").write_text(find_blocks("yaml")[0])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_its_laptop_commands_run_as_printed(workspace):
    for command in find_blocks("bash")[0].splitlines():
        program, *arguments = shlex.split(command)
        assert program == "sparsecut"
        result = CliRunner().invoke(app, arguments, catch_exceptions=False)
        assert result.exit_code == 0, (command, result.output)
    entries = (workspace / "runs" / "mine").iterdir()
    written = {path.name for path in entries if not path.name.startswith(".")}  # without the lock
    assert written == {"config.yaml", "inputs.json", "align", "tune", "final", "eval"}
    assert (workspace / "runs" / "mine" / "tune" / "checkpoint-4").is_dir()


def test_engines_it_names_are_arguments_of_a_stage(workspace):
    for line in find_blocks("yaml")[-1].splitlines():
        args = yaml.safe_load(line)["args"]
        if "deepspeed" in args:
            config = json.loads(find_deepspeed(args["deepspeed"]).read_text())
            assert config["zero_optimization"]["stage"] == 3
        changes = [f"stages.1.args.{key}={json.dumps(value)}" for key, value in args.items()]
        assert load_recipe("mine.yaml", changes).stages[1].args["bf16"] is True


def test_its_adapters_are_a_stage(workspace):
    stages = read_yaml(find_blocks("yaml")[0], "recipe")["stages"]
    second = {**stages[1], **read_yaml(find_blocks("yaml")[1], "stage")}
    stage = load_recipe("mine.yaml", [f"stages.1={json.dumps(second)}"]).stages[1]
    assert stage.train == ("fusion", "language:lora")
    assert stage.lora.dropout == 0.05


def test_files_it_points_to_exist():
    links = re.findall(r"\]\(\.\./([^)]+)\)", GUIDE)
    recipes = re.findall(r"(?:torchrun|accelerate)[^\n]* sparsecut train (\S+)", GUIDE)
    tests = re.findall(r"`pytest (\S+)`", GUIDE)
    assert links
    assert recipes
    assert tests
    for name in [*links, *tests]:
        assert (ROOT / name).is_file(), name
    for name in recipes:
        assert load_recipe(name).stages
