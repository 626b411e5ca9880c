"""Files that cannot be read, and values that cannot be, are told in one line, wherever typed."""

import io
import json
import shutil
import sys

import pytest
import torch
from PIL import Image

from sparsecut import build
from sparsecut.building import save
from sparsecut.cli import main as cli
from sparsecut.config.recipe import dump_recipe, load_recipe
from sparsecut.drawing import draw
from sparsecut.loading import load_pretrained
from sparsecut.schema import UserError
from sparsecut.training.checkpoints import check_intact

RECIPE = """
model: {vision: shapes, language: shapes}
fusion: sparsecut
stages:
  - name: align
    data: {path: questions.json}
    train: [fusion]
    args: {max_steps: 2, per_device_train_batch_size: 2, use_cpu: true, save_steps: 1}
output: trained
"""
STUDY = """
title: small
recipe:
  model: {vision: shapes, language: shapes}
  stages: [{name: align, data: {path: questions.json}, train: [fusion]}]
  evaluate: {data: {path: questions.json}}
seeds: [0]
budgets: {main: []}
baseline: llava
arms: {llava: llava}
output: studied
"""
DAMAGES = {
    "empty": b"",
    "binary": bytes(range(256)),
    "latin": "{'a': 'h\u00e9'}".encode("latin-1"),
    "cut": b'{"model": [1, 2',
    "list": b"[1, 2]",
    "text": b'"abc"',
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a picture, questions, a recipe, a study, a built model and an evaluation."""
    made = tmp_path_factory.mktemp("made")
    Image.new("RGB", (20, 20), "red").save(made / "red.png")
    turns = [{"from": "human", "value": "<image>\nwhat"}, {"from": "gpt", "value": "red"}]
    records = [{"id": f"a.{i}", "image": "red.png", "conversations": turns} for i in range(4)]
    (made / "questions.json").write_text(json.dumps(records))
    (made / "recipe.yaml").write_text(RECIPE)
    (made / "study.yaml").write_text(STUDY)
    save(*build("shapes", "shapes", "sparsecut"), made / "model")
    for name in ("one", "two"):
        evaluation = made / name
        evaluation.mkdir()
        (evaluation / "result.json").write_text("{}")
        (evaluation / "settings.json").write_text("{}")
        (evaluation / "predictions.jsonl").write_text("")
    return made


@pytest.fixture
def refuse(made, tmp_path, monkeypatch, capsys):
    """Types a command in a copy of `made`, checks that it is refused, and returns the line."""
    place = tmp_path / "place"
    shutil.copytree(made, place)

    def refuse(typed: str) -> str:
        monkeypatch.chdir(place)
        monkeypatch.setattr(sys, "argv", ["sparsecut", *typed.split()])
        monkeypatch.setattr(sys, "stdin", io.StringIO(""))
        before = set(place.iterdir())
        with pytest.raises(SystemExit) as leaving:
            cli.main()
        lines = [line for line in capsys.readouterr().err.splitlines() if line[:6] == "error:"]
        assert leaving.value.code == 2 and len(lines) == 1, lines
        assert set(place.iterdir()) == before
        return lines[0]

    refuse.place = place
    return refuse


def damage(path, kind: str) -> None:
    """Put something that cannot be read in the place of a file."""
    path.unlink(missing_ok=True)
    if kind == "folder":
        path.mkdir()
    elif kind != "missing":
        path.write_bytes(DAMAGES[kind])


@pytest.mark.parametrize("kind", [*DAMAGES, "folder", "missing"])
@pytest.mark.parametrize(
    "file, typed",
    {
        "recipe.yaml": "train recipe.yaml",
        "study.yaml": "study study.yaml",
        "plan.yaml": "cost plan.yaml",
        "one/result.json": "compare one two --out new",
        "model/config.json": "show model",
        "fusion.json": "show .",
    }.items(),
)
def test_a_damaged_text_file_is_named(refuse, file, typed, kind):
    damage(refuse.place / file, kind)
    folder, _, name = file.rpartition("/")
    line = refuse(typed)
    is_there = kind not in ("missing", "folder")
    assert not is_there or name in line or folder in line


@pytest.mark.parametrize("kind", [*DAMAGES, "folder"])
@pytest.mark.parametrize(
    "file", ["config.json", "model.safetensors", "tokenizer.json", "processor_config.json"]
)
def test_a_damaged_model_is_named(refuse, file, kind):
    damage(refuse.place / "model" / file, kind)
    line = refuse("eval model --data questions.json --device cpu")
    assert "model" in line


@pytest.mark.parametrize("ending", ["json", "jsonl", "parquet", "arrow", "tar"])
@pytest.mark.parametrize("kind", ["binary", "cut", "folder"])
def test_damaged_records_are_named(refuse, ending, kind):
    damage(refuse.place / f"records.{ending}", kind)
    line = refuse(f"train recipe.yaml --check stages.0.data.path=records.{ending}")
    assert f"records.{ending}" in line


WRONG = [
    "seed=-1",
    f"seed={2**32}",
    "output=" + "n" * 300,
    "stages.0.args.accelerator_config=absent.json",
    "stages.0.args.optim=galore_adamw",
    "stages.0.args.report_to=absent",
    "stages.0.args.learning_rate=.nan",
    "stages.0.gate_penalty=.nan",
    "stages.0.data.weight=.inf",
    "stages.0.template=[]",
    "fusion.method=[[]]",
    "stages.0.data.path={0..99999999}.json",
]


@pytest.mark.parametrize("change", WRONG)
def test_values_that_cannot_be_are_refused_before_training(refuse, change):
    assert change.partition("=")[2].strip(".")[:6] in refuse(f"train recipe.yaml --check {change}")


@pytest.mark.parametrize("file", ["whole.json", "trainer_state.json", "optimizer.pt"])
@pytest.mark.parametrize("kind", ["missing", "cut"])
def test_a_damaged_checkpoint_is_refused_before_anything_is_changed(refuse, file, kind):
    if (file, kind) == ("whole.json", "missing"):
        return  # it was never complete
    checkpoint = refuse.place / "trained" / "align" / "checkpoint-1"
    checkpoint.mkdir(parents=True)
    dump_recipe(load_recipe(refuse.place / "recipe.yaml"), refuse.place / "trained" / "config.yaml")
    (checkpoint / "whole.json").write_text('{"global_batch": 2, "processes": 1}')
    (checkpoint / "trainer_state.json").write_text('{"global_step": 1, "max_steps": 2}')
    shutil.copy(refuse.place / "model" / "model.safetensors", checkpoint)
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        torch.save({}, checkpoint / name)
    check_intact(checkpoint)
    damage(checkpoint / file, kind)
    line = refuse("train recipe.yaml --resume")
    assert "checkpoint-1" in line and file in line


def test_a_record_from_nobody_is_refused(refuse):
    records = json.loads((refuse.place / "questions.json").read_text())
    records[0]["conversations"][0]["from"] = {}
    (refuse.place / "questions.json").write_text(json.dumps(records))
    assert "record 0" in refuse("train recipe.yaml --check")


@pytest.mark.parametrize("budget", ["--ratio nan", "--ratio inf"])
def test_a_search_needs_a_budget_that_is_a_number(refuse, budget):
    assert "ratio" in refuse(f"search study.yaml {budget}")


def test_the_file_for_costs_must_not_be_a_folder(refuse):
    assert "model" in refuse("cost sparsecut --json model")
    assert "recipe.yaml" in refuse("cost sparsecut --json recipe.yaml/costs.json")


class Damaged:
    """A class of another package that stumbles over a damaged file."""

    @staticmethod
    def from_pretrained(name):
        raise KeyError("a damaged file")


class Ours:
    """A class that runs code of this package, which has a fault here."""

    @staticmethod
    def from_pretrained(name):
        return draw(name, 1, 1)


def test_an_error_in_our_own_code_stays_one(tmp_path):
    with pytest.raises(UserError, match=r"cannot be read.*KeyError: 'a damaged file'"):
        load_pretrained(Damaged, tmp_path, "cannot be read")
    with pytest.raises((AttributeError, TypeError)):
        load_pretrained(Ours, tmp_path, "cannot be read")
