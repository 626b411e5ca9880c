"""A mistake in what is typed is answered before any model library is imported."""

import json
import shutil

import pytest
from helpers.early_answers import MOST_SECONDS, answer_commands

from sparsecut.config.yaml_io import dump_yaml
from sparsecut.shapes import EXAMPLE_IMAGE
from sparsecut.training.run_dir import FINISHED, RECIPE

PLAIN = """
model: {vision: shapes, language: shapes}
fusion: {method: sparsecut%s}
output: %s
stages: [{name: one, train: [fusion], data: {path: q.json}, args: {%s: %s}}]
"""
BUILD = "build --vision shapes --language shapes --out new"
LONGEST_ERROR = 900  # characters
# Each command, with what its answer must name.
COMMANDS = {
    "chat empty": "empty",
    "chat file.txt": "file.txt",
    "chat model gone.png": "gone.png",
    "chat model file.txt": "file.txt",
    "chat model --audio file.txt": "file.txt",
    "chat one.png --ask x": "chat shapes one.png",
    "chat gone.JPG --ask x": "chat shapes gone.JPG",
    "chat gone.wav": "--audio gone.wav",
    "chat shape": "'shapes'",
    "serve gone.png": "serve shapes",
    "eval one.png --data q.json": "eval shapes",
    "eval q.json": "eval shapes --data q.json",
    "explain records.json --data q.json": "explain shapes --data records.json",
    "eval shapes --data records.jsn": "'records.json'",
    "upgrade gone.png --out new": "an image",
    "shapes point gone.png": "shapes point shapes",
    "cost --base gone.png": "an image",
    "train records.json": "250 records",
    "train records.yaml": "250 records",
    "train one.png": "an image",
    "train rows.csv": "data",
    "train plain.yml": "'plain.yaml'",
    "train plain": "'plain.yaml'",
    "study records.json": "250 records",
    "search one.png": "an image",
    "show records.json": "250 records",
    "recipes tiny": "recipes show tiny",
    "chat model --audio gone.wav": "gone.wav",
    "chat model --device cudo": "cuda",
    "chat model --dtype float33": "float32",
    "chat model --template-arg x": "--template-arg",
    "serve empty": "empty",
    "serve model --dtype x": "float32",
    "serve model --device cudo:0": "cuda",
    "serve model --host 300.1.1.1": "300.1.1.1",
    "eval empty --data q.json": "empty",
    "eval model --data q.json --device cuda:x": "cuda:x",
    "eval model --tasks popp --root . --out new": "pope",
    "eval model --tasks pope --root empty --out new": "empty/pope",
    "eval model --tasks pope --root . --out new --part 5/4": "5/4",
    "explain empty --data q.json": "empty",
    "explain model --data q.json --dtype x": "bfloat16",
    "cost sparsecut --vision clip-l-337": "clip-l-336",
    "cost sparsecut --language lama-7b": "llama-7b",
    "cost sparsecut --vision llama-7b": "llama-7b",
    "cost sparsecut --vision empty": "empty",
    "cost sparsecut -o countt=3": "count",
    "cost sparsecut -o count=abc": "abc",
    "cost sparsecut -o count=25": "24",
    "cost sparsecut --view-size 0": "view-size",
    "cost sparsecut --device cudo": "cuda",
    "cost --base empty": "empty",
    "cost --base model -o countt=3": "count",
    "train option.yaml": "count",
    "train argument.yaml": "max_steps",
    "train typed.yaml": "max_steps: 100",
    "train quoted.yaml": "without quotes",
    "train argument.yaml --dry-run": "max_steps",
    "train deepspeed.yaml": "zero3",
    "train output.yaml": "file.txt",
    "train finished.yaml": "--overwrite",
    "train finished.yaml stages.0.args.max_steps=2": "stages",
    "train plain.yaml --resume --overwrite": "--resume, --overwrite",
    "train plain.yaml --devices 2": "--dry-run",
    "train plain.yaml --dry-run --tflops 0": "--tflops",
    "train plain.yaml --dry-run --mfu 2": "--mfu",
    "compare empty empty": "empty",
    "compare empty empty --images gone": "gone",
    "study shapes --variant nope": "nope",
    "study shapes --seed 99": "99",
    "study shapes output=file.txt": "file.txt",
    "study shapes --report output=gone": "gone",
    "search shapes output=file.txt": "file.txt",
    "upgrade empty --out new": "empty",
    "upgrade q.json --out new": "q.json",
    "upgrade model --out new -o countt=3": "count",
    "convert empty new --vision model": "empty",
    "convert model new --vision model --fusion typo": "cross_mlp",
    f"{BUILD} --coarse typo": "squash",
    f"{BUILD} -o countt=1": "count",
    f"{BUILD} -o count=25": "25",
    "build --vision shape --language shapes --out new": "vision model 'shape'",
    "build --vision shapes --language shapess --out new": "language model 'shapess'",
    f"{BUILD} --view-size 0": "view-size",
    f"{BUILD} --min-pixels 9": "native",
    "build --vision empty --language shapes --out new": "empty",
    "push empty owner/name --dry-run new": "empty",
    "push model owner/name --dry-run file.txt": "file.txt",
    "card empty": "empty",
    "card model --scores gone": "gone",
    "shapes pretrain --size huge --out new": "large",
    "shapes pretrain --device cudo --out new": "cuda",
    "shapes point gone/a": "gone/a",
}


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """What each command said."""
    folder = tmp_path_factory.mktemp("mistakes")
    (folder / "empty").mkdir()
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text('{"model_type": "sparsecut"}')
    (folder / "q.json").write_text("[]")
    (folder / "file.txt").write_text("text")
    (folder / "rows.csv").write_text("question,answer\n")
    shutil.copy(EXAMPLE_IMAGE, folder / "one.png")
    records = json.dumps([{"question": "How many?", "answer": "2"}] * 250)
    (folder / "records.json").write_text(records)
    (folder / "records.yaml").write_text(dump_yaml(json.loads(records)))
    recipes = {
        "plain": ("", "out", "max_steps", 1),
        "option": (", countt: 3", "out", "max_steps", 1),
        "typed": ("", "out", "max_steps", "four"),
        "quoted": ("", "out", "bf16", "'true'"),
        "argument": ("", "out", "max_stepz", 1),
        "deepspeed": ("", "out", "deepspeed", "zero9"),
        "output": ("", "file.txt", "max_steps", 1),
        "finished": ("", "done", "max_steps", 1),
    }
    for name, values in recipes.items():
        (folder / f"{name}.yaml").write_text(PLAIN % values)
    (folder / "done" / "one").mkdir(parents=True)
    (folder / "done" / "one" / FINISHED).write_text("{}")
    shutil.copy(folder / "finished.yaml", folder / "done" / RECIPE)
    found = answer_commands(list(COMMANDS), folder)
    assert not (folder / "new").exists() and not (folder / "out").exists()
    return found


@pytest.mark.parametrize("command", COMMANDS)
def test_a_mistake_is_told_within_a_second_of_work(answers, command):
    code, imported, seconds, error = answers[command]
    assert code == 2 and imported == [], error
    assert seconds < MOST_SECONDS
    assert COMMANDS[command] in error and len(error) < LONGEST_ERROR


def test_names_of_arguments_are_those_of_transformers():
    from dataclasses import fields

    from transformers import TrainingArguments

    from sparsecut.cli.early_checks import find_training_arguments

    names = {field.name for field in fields(TrainingArguments)}
    assert names <= set(find_training_arguments())
