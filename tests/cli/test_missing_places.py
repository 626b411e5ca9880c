"""A missing model or file is told before any model library is imported."""

import subprocess
import sys

import pytest

from sparsecut.building import OLD_SHAPES, SHAPES
from sparsecut.config.places import BUILT_IN

RECIPE = """
model: {vision: %s, language: shapes}
fusion: {method: sparsecut}
output: out
stages: [{name: one, train: [fusion], data: {path: %s}, args: {max_steps: 1}}]
"""
CODE = """
import sys, time
from sparsecut.cli.main import main
start = time.monotonic()
try:
    main()
except SystemExit as exit:
    print(exit.code, {"torch", "transformers", "datasets"} & set(sys.modules), time.monotonic() - start)
"""
COMMANDS = [
    "chat gone/a/b",
    "chat owner/gone --ask x",
    "serve gone/a/b",
    "eval gone/a/b --data questions.json",
    "eval . --data gone/a/questions.json",
    "explain gone/a/b --data questions.json",
    "upgrade gone/a/b --out new",
    "build --vision gone/a/b --language shapes --out new",
    "build --vision shapes --language owner/gone --out new",
    "convert . new --vision gone/a/b",
    "cost llava --vision gone/a/b",
    "cost --base gone/a/b",
    "train model.yaml",
    "train data.yaml --check",
]


@pytest.mark.parametrize("command", COMMANDS)
def test_what_is_missing_is_told_at_once(tmp_path, command):
    (tmp_path / "questions.json").write_text("[]")
    (tmp_path / "model.yaml").write_text(RECIPE % ("gone/a/b", "questions.json"))
    (tmp_path / "data.yaml").write_text(RECIPE % ("shapes", "gone/a/b.json"))
    done = subprocess.run(
        [sys.executable, "-c", CODE, *command.split()], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.stdout.startswith("2 set()"), done.stdout + done.stderr
    assert "gone" in done.stderr and done.stderr.count("\n") == 1
    assert float(done.stdout.split()[-1]) < 5 and not (tmp_path / "new").exists()


def test_built_in_backbones_have_the_same_names():
    assert set(BUILT_IN) == {SHAPES, OLD_SHAPES}
