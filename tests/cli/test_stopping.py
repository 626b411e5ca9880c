"""A command that Ctrl-C or SIGTERM stops says where, what is saved and how to go on.

Each runs as a process of its own on tiny data, in a process group, as a terminal would have it. It
gets the signal at a step that is drawn, ends soon, and leaves neither processes nor half a model.
"""

import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.tiny import tiny_language, tiny_tokenizer, tiny_vision
from PIL import Image
from transformers import CLIPImageProcessorPil

from sparsecut.cli import train
from sparsecut.cli.stopping import Stopped, describe_rest, stop_with_reason
from sparsecut.config.paths import write_whole_folder
from sparsecut.experiments import runner
from sparsecut.schema import UserError
from sparsecut.waits import Terminated, end_children_at_error, interrupt_at_sigterm, show_step

TESTS = Path(__file__).parents[1]
STEPS = "{max_steps: 3, save_strategy: 'no', per_device_train_batch_size: 2}"
RECIPE = f"""
model: {{vision: vision, language: language}}
fusion: {{method: sparsecut, count: 2}}
stages:
  - {{name: one, train: [fusion], data: {{path: questions.json}}, args: {STEPS}}}
  - {{name: two, train: [fusion, language], data: {{path: questions.json}}, args: {STEPS}}}
output: run
"""
COMMANDS = {  # command -> its words
    "build": "build --vision vision --language language --out made",
    "train": "train recipe.yaml",
    "check": "train recipe.yaml --check output=other",
    "eval": "eval model --data questions.json --out answers --batch-size 1",
    "explain": "explain model --data questions.json --out report --batch-size 4",
    "draw": "shapes draw drawn --train 12 --dev 0 --test 6",
}
MAY_DIFFER = (
    *("events", ".lock", "training_args.bin", "images.jsonl", "result.json", "trainer_state"),
    *("log.jsonl", "explain", "versions.json", "inputs.json", "README.md", "checkpoint-"),
)


def make_question(number: int) -> dict:
    color = ("red", "blue")[number % 2]
    turns = [{"from": "human", "value": "<image>\nwhat is it"}, {"from": "gpt", "value": color}]
    return {"id": str(number), "image": f"{color}.png", "conversations": turns}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with two backbones, a recipe, eight questions, and nothing made of them yet."""
    home = tmp_path_factory.mktemp("home")
    torch.manual_seed(1)
    tiny_vision().save_pretrained(home / "vision")
    CLIPImageProcessorPil().save_pretrained(home / "vision")
    tiny_language().save_pretrained(home / "language")
    tiny_tokenizer().save_pretrained(home / "language")
    for color in ("red", "blue"):
        Image.new("RGB", (20, 30), color).save(home / f"{color}.png")
    (home / "questions.json").write_text(json.dumps([make_question(i) for i in range(8)]))
    (home / "recipe.yaml").write_text(RECIPE)
    return home


@pytest.fixture(scope="module")
def run(home, tmp_path_factory):
    """A function (words, folder, event, signal) -> what became of the command."""
    path = os.pathsep.join([str(TESTS), str(TESTS.parent)])
    program = subprocess.Popen(
        [
            sys.executable,
            str(TESTS / "helpers" / "stopped.py"),
            str(tmp_path_factory.mktemp("log")),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        text=True,
    )

    def run(words: str, folder: Path, event: int = 0, name: str = "SIGINT") -> dict:
        task = {"words": shlex.split(words), "folder": str(folder), "event": event, "signal": name}
        program.stdin.write(json.dumps(task) + "\n")
        program.stdin.flush()
        return json.loads(program.stdout.readline())

    made = run(COMMANDS["build"].replace("made", "model"), home)
    assert made["code"] == 0, made
    yield run
    program.stdin.close()
    program.wait()


def read_files(folder: Path) -> dict[str, bytes]:
    """All files below a folder, but for those that hold times."""
    files = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_file() and not any(part in name for part in MAY_DIFFER):
            files[name] = path.read_bytes().replace(str(folder).encode(), b"FOLDER")
    return files


@pytest.mark.parametrize("command", COMMANDS)
def test_a_stopped_command_says_how_to_go_on_and_does(home, run, tmp_path, command):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    shutil.copytree(home, whole)
    shutil.copytree(home, stopped)
    done = run(COMMANDS[command], whole)
    assert done["code"] == 0, done["error"]
    assert done["events"] >= 3

    draw = random.Random(command)
    words = COMMANDS[command]
    for name, code in (("SIGINT", 130), ("SIGTERM", 143)):
        ended = run(words, stopped, draw.randint(1, done["events"]), name)
        if ended["code"] == 0:  # what was left had fewer steps
            break
        assert ended["code"] == code, ended["error"]
        assert "Traceback" not in ended["error"]
        assert ended["seconds"] < 5
        assert ended["left"] == []
        assert not (stopped / "made").exists()
        words = find_next(ended["error"]) or COMMANDS[command]
    if ended["code"]:
        again = run(words, stopped)
        assert again["code"] == 0, again["error"]
    assert read_files(stopped) == read_files(whole)


def find_next(text: str) -> str | None:
    """The command that a message says to go on with, without the program's name."""
    for mark in ("Go on with: sparsecut ", "Start over: sparsecut "):
        if mark in text:
            return text.rpartition(mark)[2].strip()
    return None


@pytest.mark.parametrize("event", ["first", "middle", "last"])
def test_training_goes_on_from_wherever_it_was_stopped(home, run, tmp_path, event):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    shutil.copytree(home, whole)
    shutil.copytree(home, stopped)
    number = run(COMMANDS["train"], whole)["events"]
    at = {"first": 1, "middle": number // 2, "last": number}[event]
    ended = run(COMMANDS["train"], stopped, at)
    assert ended["code"] == 130, ended["error"]
    again = run(find_next(ended["error"]), stopped)
    assert again["code"] == 0, again["error"]
    weights = "run/final/model.safetensors"
    assert (stopped / weights).read_bytes() == (whole / weights).read_bytes()


def test_an_evaluation_keeps_its_answers(home, run, tmp_path):
    words = COMMANDS["eval"].replace("answers", str(tmp_path / "answers"))
    number = run(words.replace("answers", "whole"), home)["events"]
    ended = run(words, home, number - 2)
    assert str(tmp_path / "answers") in ended["error"]
    lines = (tmp_path / "answers" / "predictions.jsonl").read_text().splitlines()
    assert len(lines) >= 5
    assert run(words, home)["code"] == 0
    assert json.loads((tmp_path / "answers" / "result.json").read_text())["num_kept"] >= 5


def test_the_place_and_the_signal_are_told():
    for error, code in ((KeyboardInterrupt(), 130), (Terminated(), 143)):
        with (
            pytest.raises(Stopped) as caught,
            stop_with_reason("explain", {}),
            show_step("conditions", 8) as step,
        ):
            for _ in step.count(range(8)):
                if step.done == 3:
                    raise error
        assert caught.value.exit_code == code
        assert "conditions (3 of 8)" in str(caught.value)


def test_an_error_is_no_stop():
    with pytest.raises(ZeroDivisionError), stop_with_reason("explain", {}):
        raise ZeroDivisionError


def write_to_a_full_disk():
    """Write to a device that is always full."""
    with open("/dev/full", "w") as file:
        file.write("x" * 100_000)


def fail_as_safetensors_does():
    """Raise what a library raises that is not written in Python, explained by another error."""
    text = "Error while serializing: I/O error: No space left on device (os error 28)"
    try:
        raise ValueError(text)
    except ValueError as error:
        raise RuntimeError("the model could not be saved") from error


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="there is no /dev/full")
@pytest.mark.parametrize("write", [write_to_a_full_disk, fail_as_safetensors_does])
def test_a_full_disk_is_told_with_what_is_left(write):
    with (
        pytest.raises(UserError, match=r"a disk is full .*Finished runs"),
        stop_with_reason("study", {}),
    ):
        write()


def test_the_outer_command_explains_what_is_left():
    with (
        pytest.raises(Stopped) as caught,
        stop_with_reason("study", {}),
        stop_with_reason("draw", {}),
    ):
        raise KeyboardInterrupt
    assert describe_rest("study", {}) in str(caught.value)


def test_sigterm_interrupts_inside_the_block_only():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Terminated), interrupt_at_sigterm():
        os.kill(os.getpid(), signal.SIGTERM)
        threading.Event().wait(5)
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_study_that_is_stopped_leaves_no_process(monkeypatch, tmp_path):
    processes = []
    stubborn = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"

    def start(out, number, parts):
        code = stubborn if number else "import time; time.sleep(60)"
        processes.append(subprocess.Popen([sys.executable, "-c", code]))
        return processes[-1]

    def watch(*arguments):
        raise Terminated

    monkeypatch.setattr(runner, "SECONDS_TO_END", 1)
    monkeypatch.setattr(runner, "_start_process", start)
    monkeypatch.setattr(runner, "_watch", watch)
    with pytest.raises(Terminated):
        runner._supervise(None, tmp_path, 2, [], print)
    assert all(process.poll() is not None for process in processes)


def test_a_folder_is_whole_or_not_there(tmp_path):
    folder = tmp_path / "model"
    with pytest.raises(KeyboardInterrupt), write_whole_folder(folder, ["config.json"]) as part:
        (part / "config.json").write_text("{}")
        raise KeyboardInterrupt
    assert not folder.exists()
    folder.mkdir()
    (folder / "README.md").write_text("mine")
    with write_whole_folder(folder, ["config.json"]) as part:
        assert part.name == "model"
        assert (part / "README.md").read_text() == "mine"
        (part / "config.json").write_text("{}")
        assert not (folder / "config.json").exists()
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "config.json"]


def test_children_end_with_what_started_them():
    import multiprocessing

    child = multiprocessing.get_context("fork").Process(target=threading.Event().wait)
    with pytest.raises(KeyboardInterrupt), end_children_at_error():
        child.start()
        raise KeyboardInterrupt
    child.join(5)
    assert not child.is_alive()


@pytest.mark.parametrize("kind", [UserError, RuntimeError])
def test_an_evaluation_that_fails_after_training_says_what_is_safe(tmp_path, monkeypatch, kind):
    def fail(*args, **settings):
        raise kind("the image 3.png is broken")

    monkeypatch.setattr("sparsecut.evaluation.evaluator.evaluate_recipe", fail)
    monkeypatch.setattr("sys.argv", ["sparsecut", "train", "mine.yaml", "--overwrite"])
    recipe = SimpleNamespace(output=str(tmp_path / "run"))
    with pytest.raises(kind, match="broken") as caught:
        train._evaluate(recipe, None, None, False)
    said = " ".join([str(caught.value), *getattr(caught.value, "__notes__", [])])
    assert str(tmp_path / "run" / "final") in said
    assert said.endswith("sparsecut train mine.yaml --resume")
