"""A missing model or file is told before any model library is imported."""

import pytest
from helpers.early_answers import MOST_SECONDS, answer_commands

from sparsecut.adapters import FOLDER
from sparsecut.building import OLD_SHAPES, SHAPES
from sparsecut.config.places import BUILT_IN, KNOWN_SIZES
from sparsecut.profiling.sizes import PUBLISHED_BASES, PUBLISHED_CONFIGS, REFERENCE
from sparsecut.training.run_dir import ADAPTERS

RECIPE = """
model: {vision: %s, language: shapes}
fusion: {method: sparsecut}
output: out
stages: [{name: one, train: [fusion], data: {path: %s}, args: {max_steps: 1}}]
"""
STUDY = """
title: one
recipe:
  model: {vision: %s, language: shapes}
  stages: [{name: one, train: [fusion], data: {path: %s}, args: {max_steps: 1}}]
  evaluate: {data: {path: questions.json}}
baseline: llava
arms: {llava: llava}
output: new
"""
COMMANDS = [
    "chat gone/a/b",
    "chat owner/gone --ask x",
    "serve gone/a/b",
    "card gone/a/b",
    "push gone/a/b owner/new",
    "push . owner/gone",
    "eval gone/a/b --data questions.json",
    "eval . --data gone/a/questions.json",
    "eval . --data owner/gone",
    "eval gone/a/b --tasks pope --root . --out new",
    "eval . --tasks pope --root gone/a --out new",
    "explain gone/a/b --data questions.json",
    "explain . --data mine/gone.json",
    "compare gone/a/b gone/a/c --out new",
    "compare one=gone/a/b two=gone/a/c --out new",
    "upgrade gone/a/b --out new",
    "build --vision gone/a/b --language shapes --out new",
    "build --vision shapes --language owner/gone --out new",
    "convert . new --vision gone/a/b",
    "cost llava --vision gone/a/b",
    "cost --base gone/a/b",
    "train model.yaml",
    "train model.yaml --dry-run",
    "train hub-model.yaml --dry-run",
    "train data.yaml --check",
    "train hub-data.yaml",
    "train hub-data.yaml stages.0.data.streaming=true --check",
    "train file.yaml --resume",
    "study study-model.yaml",
    "study study-data.yaml",
    "search study-model.yaml",
    "search study-data.yaml",
]


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """What each command said."""
    folder = tmp_path_factory.mktemp("missing")
    (folder / "questions.json").write_text("[]")
    names = {
        "model.yaml": RECIPE % ("gone/a/b", "questions.json"),
        "hub-model.yaml": RECIPE % ("owner/gone", "questions.json"),
        "data.yaml": RECIPE % ("shapes", "gone/a/b.json"),
        "hub-data.yaml": RECIPE % ("shapes", "owner/gone"),
        "file.yaml": RECIPE % ("shapes", "mine/gone.jsonl.gz"),
        "study-model.yaml": STUDY % ("gone/a/b", "questions.json"),
        "study-data.yaml": STUDY % ("shapes", "owner/gone"),
    }
    for name, text in names.items():
        (folder / name).write_text(text)
    found = answer_commands(COMMANDS, folder)
    assert not (folder / "new").exists() and not (folder / "out").exists()
    return found


@pytest.mark.parametrize("command", COMMANDS)
def test_what_is_missing_is_told_at_once(answers, command):
    code, imported, seconds, error = answers[command]
    assert code == 2 and imported == [] and seconds < MOST_SECONDS
    assert "gone" in error and error.count("\n") == 1 and error.startswith("error: ")


def test_names_are_those_of_the_modules_that_are_imported_later():
    assert set(BUILT_IN) == {SHAPES, OLD_SHAPES}
    sizes = {name for part in REFERENCE.values() for name in part}
    assert ADAPTERS == FOLDER
    assert set(KNOWN_SIZES) == sizes | set(PUBLISHED_CONFIGS) | set(PUBLISHED_BASES)
