"""The README's Python runs as printed; its commands, options, files and tests exist.

`tests/conformance/test_doc_pages.py` runs its commands as printed.
"""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from sparsecut.cli.main import app

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_python_blocks_run(tmp_path, monkeypatch, capsys, llava):
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len(blocks) >= 2
    monkeypatch.chdir(tmp_path)
    for part in llava:  # a tiny model in the place of the one that is named
        part.save_pretrained("llava-hf/llava-1.5-7b-hf")
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})
    answer = capsys.readouterr().out.strip()
    assert answer, "the shortest code prints an answer"


def test_the_drawing_is_what_the_command_prints():
    block = re.search(r"\$ (sparsecut show [^\n]*)\n(.*?)```", README, re.S)
    command = [sys.executable, "-m", *block[1].split()]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert printed.startswith(block[2].rstrip())


def list_commands() -> list[list[str]]:
    """Every `sparsecut ...` of the README, in code blocks and in the text, split into words."""
    lines = re.findall(r"^\$? ?(sparsecut [^\n#]*)", README, re.M)
    lines += re.findall(r"`(sparsecut [^`\n]*)`", README)
    return [shlex.split(line) for line in lines]


@pytest.mark.parametrize("words", list_commands(), ids=" ".join)
def test_every_command_and_option_exists(words):
    group = typer.main.get_command(app)
    command = group.commands[words[1]]
    rest = words[2:]
    if isinstance(command, typer.core.TyperGroup) and rest:
        command = command.commands[rest[0]]
        rest = rest[1:]
    known = set()
    for parameter in command.params:
        known.update(parameter.opts)
    assert {word for word in rest if word.startswith("-")} <= known


def test_every_file_that_it_names_exists():
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", README)
    paths = re.findall(r"`?(?:pytest|python|sparsecut \w+) ((?:[\w-]+/)+[\w.-]+\.\w+)", README)
    assert len(links) > 10 and len(paths) > 3
    assert [name for name in links + paths if not (ROOT / name).exists()] == []
