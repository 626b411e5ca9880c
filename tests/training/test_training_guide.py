"""docs/training.md, followed word for word: its data, its recipe, its commands; and the engines'
files it names.
"""

import json
import re
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from sparsecut.cli.main import app
from sparsecut.config.recipe import load_recipe
from sparsecut.config.yaml_io import read_yaml
from sparsecut.shapes.questions import split_scene
from sparsecut.shapes.scenes import draw

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")


def blocks(kind: str) -> list[str]:
    return re.findall(rf"```{kind}\n(.*?)```", GUIDE, re.S)


@pytest.fixture
def desk(tmp_path, monkeypatch):
    """A folder as the guide has its reader make it."""
    (tmp_path / "mine").mkdir()
    for i in range(2):
        draw(split_scene(f"test/{i}/0")).save(tmp_path / "mine" / f"{i}.png")
    (tmp_path / "mine" / "data.json").write_text(blocks("json")[0])
    (tmp_path / "mine.yaml").write_text(blocks("yaml")[0])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_its_laptop_commands_run_as_they_stand(desk):
    for command in blocks("sh")[0].splitlines():
        arguments = [word.strip('"') for word in re.findall(r'"[^"]*"|\S+', command)]
        assert arguments[0] == "sparsecut"
        result = CliRunner().invoke(app, arguments[1:], catch_exceptions=False)
        assert result.exit_code == 0, (command, result.output)
    written = {path.name for path in (desk / "runs" / "mine").iterdir()}
    assert written == {"config.yaml", "align", "tune", "final", "eval"}
    assert (desk / "runs" / "mine" / "tune" / "checkpoint-4").is_dir()


def test_engines_it_names_are_arguments_of_a_stage(desk):
    for line in blocks("yaml")[-1].splitlines():
        args = yaml.safe_load(line)["args"]
        if "deepspeed" in args:
            assert (
                json.loads((ROOT / args["deepspeed"]).read_text())["zero_optimization"]["stage"]
                == 3
            )
        changes = [f"stages.1.args.{key}={json.dumps(value)}" for key, value in args.items()]
        assert load_recipe("mine.yaml", changes).stages[1].args["bf16"] is True


def test_its_adapters_are_a_stage(desk):
    stage = load_recipe("mine.yaml", [f"stages.1={json.dumps(whole_stage())}"]).stages[1]
    assert stage.train == ("fusion", "language:lora") and stage.lora.dropout == 0.05


def whole_stage() -> dict:
    """The guide's second stage with the lines on adapters in place."""
    second = read_yaml(blocks("yaml")[0].split("stages:")[1].split("evaluate:")[0], "stages")[1]
    return {**second, **read_yaml(blocks("yaml")[1], "stage")}


def test_files_it_points_to_exist():
    for name in re.findall(
        r"\]\(\.\./([^)]+)\)|(?:torchrun|accelerate)[^\n]* (configs/\S+)", GUIDE
    ):
        assert (ROOT / (name[0] or name[1])).is_file()
    assert all((ROOT / "configs" / "deepspeed" / f"zero{stage}.json").is_file() for stage in (2, 3))
