"""`sparsecut recipes`, commands that take a recipe by name, and what a shell completes."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sparsecut.cli.main import app
from sparsecut.config.recipe import load_recipe
from sparsecut.config.shipped import find_file, list_shipped
from sparsecut.methods import METHODS
from sparsecut.schema import UserError

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def empty(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*words: str) -> str:
    """What a command prints."""
    result = CliRunner().invoke(app, words, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_everything_is_listed_with_a_line():
    lines = run("recipes").splitlines()
    for one in list_shipped():
        (line,) = [text for text in lines if text.startswith(f"  {one.name} ")][:1]
        assert len(line.split()) > 3
    tiny = next(line for line in lines if line.startswith("  tiny "))
    assert "takes: about a minute" in tiny and "needs: " in tiny
    assert "show" in run("recipes", "--help")


def test_one_is_printed_and_copied(empty):
    text = find_file("tiny", "recipe").read_text(encoding="utf-8")
    assert run("recipes", "show", "tiny") == text
    run("recipes", "show", "tiny", "--copy", "new/mine.yaml")
    assert load_recipe("new/mine.yaml") == load_recipe("tiny")
    run("recipes", "show", "study/shapes", "--copy", str(empty / "new"))
    assert (empty / "new" / "shapes.yaml").is_file()
    run("recipes", "show", "zero2", "--copy", "zero.json")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["tinny"], "did you mean 'tiny'"),
        (["tiny", "--copy", "there.yaml"], "exists"),
        (["tiny", "--copy", "mine.json"], ".yaml"),
        (["zero2", "--copy", "mine.yaml"], ".json"),
        (["tiny", "--copy", "there.yaml/mine.yaml"], "is a file"),
    ],
)
def test_what_cannot_be_shown_or_copied_is_refused(empty, words, said):
    (empty / "there.yaml").write_text("mine", encoding="utf-8")
    with pytest.raises(UserError, match=said):
        CliRunner().invoke(app, ["recipes", "show", *words], catch_exceptions=False)
    assert (empty / "there.yaml").read_text(encoding="utf-8") == "mine"
    assert sorted(path.name for path in empty.iterdir()) == ["there.yaml"]


def test_a_recipe_is_checked_by_name_in_an_empty_folder(empty):
    changes = ["stages.1.args.max_steps=1"]
    output = run("train", "tiny", *changes, "--check")
    assert "drawing the images first: sparsecut shapes draw runs/pictures" in output
    assert "tiny can be trained" in output
    assert (empty / "runs" / "pictures" / "train.json").is_file()
    assert "drawing" not in run("train", "tiny", "--check")


def test_images_are_drawn_for_recipes_that_name_them_only(empty):
    for change in ("stages.0.data.path=a.json", "stages.1.data.path=a.json"):
        with pytest.raises(UserError, match=r"a\.json"):
            run("train", "tiny", change, "evaluate.data.path=a.json", "--check")
    (empty / "mine.yaml").write_text(find_file("tiny", "recipe").read_text(), encoding="utf-8")
    shutil.rmtree("runs")
    with pytest.raises(UserError, match=r"runs.pictures"):
        run("train", "mine.yaml", "--check")


def test_plans_of_recipes_are_drawn_and_counted_by_name():
    assert run("show", "tiny", "--json") == run("show", str(find_file("tiny", "recipe")), "--json")
    assert "vision encoder" in run("show", "upgrade-llava-7b")
    assert run("show", "methods/llava", "--json") == run("show", "llava", "--json")
    assert "tiny" in run("cost", "llava", "tiny", "--vision", "shapes", "--language", "shapes")
    with pytest.raises(UserError, match="did you mean 'tiny'"):
        run("show", "tinyy")


def complete(line: str) -> list[str]:
    """What bash is told to offer after a line."""
    words = line.split(" ")
    settings = {"_SPARSECUT_COMPLETE": "complete_bash", "COMP_WORDS": line}
    settings["COMP_CWORD"] = str(len(words) - 1)
    command = [sys.executable, "-m", "sparsecut"]
    environment = {**os.environ, **settings, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_a_shell_completes_commands_recipes_and_methods(empty):
    (empty / "tidy.yaml").write_text("", encoding="utf-8")
    (empty / "times").mkdir()
    assert complete("sparsecut tr") == ["train"]
    assert complete("sparsecut train ti") == ["tiny", "tidy.yaml", "times/"]
    assert complete("sparsecut study sh") == ["shapes"]
    assert set(METHODS) <= set(complete("sparsecut show "))
    assert complete("sparsecut recipes show study/g") == ["study/gpu"]
    assert complete("sparsecut build --plan hires_c") == ["hires_channels"]
    start = time.monotonic()
    complete("sparsecut cost ll")
    assert time.monotonic() - start < 5  # 0.4 s here; torch alone would take several
    assert "--install-completion" in run("--help")
