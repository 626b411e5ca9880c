"""No command replaces or removes files that it did not write."""

import json

import pytest
import yaml
from helpers.studies import QUICK
from typer.testing import CliRunner

from sparsecut.cli.main import app
from sparsecut.schema import UserError
from sparsecut.shapes import write_split

COMMANDS = {
    "compare a=one b=two --out mine": ["compare.html", "compare.json", "compare.md"],
    "explain model --data questions.json --out mine": ["explain.html", "explain.json"],
    "cost sparsecut --json mine/notes.json": ["notes.json"],
    "shapes draw mine --train 1": ["train/0.png", "train.json", "train_captions.json"],
    "shapes pretrain --quick --out mine": ["README.md", "vision/mine.txt", "language.log"],
    "build --vision shapes --language shapes --out mine": ["model.safetensors", "tokenizer.json"],
    "upgrade base --out mine": ["fusion.safetensors", "config.json"],
    "convert released mine --vision tower": ["config.json", "generation_config.json"],
    "study study.yaml output=mine": ["costs.json", "data/train.json", "report.md"],
    "search study.yaml output=mine --count 1": ["search/plan.yaml", "search/data/dev.json"],
    "demo --quick --out mine": ["report.html", "runs/mine.txt"],
}
PAIRS = [(command, name) for command, names in COMMANDS.items() for name in names]


@pytest.mark.parametrize(("command", "name"), PAIRS)
@pytest.mark.parametrize("content", ["mine\n", '{"mine": 1}\n'])
def test_files_of_something_else_are_refused_and_untouched(
    tmp_path, monkeypatch, command, name, content
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "study.yaml").write_text(yaml.safe_dump({**QUICK, "output": "other"}))
    (tmp_path / "questions.json").write_text("[]")
    file = tmp_path / "mine" / name
    file.parent.mkdir(parents=True)
    file.write_text(content)
    done = CliRunner().invoke(app, command.split())
    assert isinstance(done.exception, UserError), (done.exception, done.output)
    assert "mine" in str(done.exception)
    assert file.read_text() == content
    left = [path for path in (tmp_path / "mine").rglob("*") if path.is_file()]
    assert [path for path in left if not path.name.startswith(".")] == [file]


def test_what_was_drawn_may_be_drawn_again(tmp_path):
    write_split(tmp_path, "train", 2, 1)
    (tmp_path / "train.json").write_text("[]")  # as a kill leaves it
    write_split(tmp_path, "train", 1, 1, seed=-5)
    write_split(tmp_path, "train", 2, 1)
    assert len(json.loads((tmp_path / "train.json").read_text())) == 2
