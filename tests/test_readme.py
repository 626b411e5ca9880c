"""The README's Python runs as it stands, and its commands are the command line's own."""

import re
import subprocess
import sys
from pathlib import Path

from sparsecut.shapes.questions import split_scene
from sparsecut.shapes.scenes import draw

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_the_python_blocks_run(tmp_path, monkeypatch, capsys, llava):
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    assert blocks
    monkeypatch.chdir(tmp_path)
    draw(split_scene("test/0/0")).save("picture.png")
    for part in llava:  # a tiny one in the place that is named
        part.save_pretrained("llava-hf/llava-1.5-7b-hf")
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})
    assert "channels" in capsys.readouterr().out


def test_the_drawing_is_what_the_command_prints():
    command = re.search(r"\$ (sparsecut show .*)\n", README)[1].split()
    printed = subprocess.run(
        [sys.executable, "-m", *command], capture_output=True, text=True, check=True
    ).stdout
    shown = re.search(r"\$ sparsecut show .*\n(.*?)```", README, re.S)[1].rstrip()
    assert printed.startswith(shown)


def test_every_command_it_names_exists():
    named = set(
        re.findall(
            r"sparsecut"
            r" (show|build|upgrade|train|eval|chat|convert|demo|shapes|cost|study|search|explain|compare)\b",
            README,
        )
    )
    listed = subprocess.run(
        [sys.executable, "-m", "sparsecut", "--help"], capture_output=True, text=True
    ).stdout
    assert named >= {"show", "train", "eval", "chat", "convert"}
    assert all(name in listed for name in named)
