"""Pages as a reader follows them: their blocks, what they are, and how they are run in order.

A comment before a block says what a test cannot guess. `<!-- file: NAME -->` says that the reader
saves the block under this name; `<!-- not run: REASON -->` says why no test runs it.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
BLOCK = re.compile(
    r"(?:<!-- (?P<mark>file|not run): (?P<value>[^\n]*?) -->\n\n?)?"
    r"^```(?P<language>\w*)\n(?P<text>.*?)^```$",
    re.DOTALL | re.MULTILINE,
)
PROGRAMS = ("sparsecut", "python", "make", "pip", "pytest", "torchrun", "accelerate", "serve")
PROGRAMS += ("cd", "vllm", "curl", "export", "source", "python3")
CLONE = ("examples", "benchmarks", "docs", "tests", "constraints.txt", "Makefile")
PORT = "8000"  # which every page names
SERVER = re.compile(r"^(?=(?:sparsecut|python \S+) serve )", re.MULTILINE)
PRELUDE = f"""set -e
start_server() {{
  if [ -f server.pid ]; then kill "$(cat server.pid)" || true; fi
  "$@" --port {PORT} > server.log 2>&1 &
  echo $! > server.pid
  for _ in $(seq 600); do
    if grep -q http:// server.log; then return 0; fi
    if ! kill -0 $! 2> /dev/null; then break; fi
    sleep 0.2
  done
  cat server.log >&2
  return 1
}}
"""


@dataclass(frozen=True)
class Block:
    """A fenced block of a page.

    Attributes:
        page: File name of the page.
        line: Where the block begins.
        language: What follows its fence.
        text: What is between the fences.
        file: Name under which the reader saves it.
        reason: Why no test runs it.
    """

    page: str
    line: int
    language: str
    text: str
    file: str | None = None
    reason: str | None = None

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def read_blocks(page: Path) -> list[Block]:
    """All fenced blocks of a page, in order."""
    text = page.read_text(encoding="utf-8")
    blocks = []
    for match in BLOCK.finditer(text):
        line = text.count("\n", 0, match.start("text"))
        marks = {"file": None, "not run": None, match["mark"]: match["value"]}
        found = Block(page.name, line, match["language"], match["text"])
        blocks.append(Block(**{**vars(found), "file": marks["file"], "reason": marks["not run"]}))
    return blocks


def list_commands(text: str) -> list[list[str]]:
    """The commands of a shell block, split into words, without comments and texts of `<<`."""
    text = re.sub(r"\\\n\s*", "", text)
    text = re.sub(r"<<(\w+)\n.*?^\1$", "", text, flags=re.DOTALL | re.MULTILINE)
    commands = []
    for line in text.splitlines():
        words = shlex.split(re.sub(r"\$\(.*?\)", "OUTPUT", line), comments=True)
        while words and re.match(r"\w+=", words[0]):
            words = words[1:]
        if words:
            commands.append(words)
    return commands


@dataclass(frozen=True)
class Setting:
    """What a reader of a page has, and what a test changes so that it takes less time.

    Attributes:
        prepare: Called in the page's folder before its first block.
        changes: Texts of the page and what stands there in the test.
    """

    prepare: Callable[[Path], None] | None = None
    changes: tuple[tuple[str, str], ...] = ()


class PageRun:
    """One page, followed from its first block to its last in one folder."""

    def __init__(self, page: Path, folder: Path, setting: Setting):
        self.blocks = read_blocks(page)
        self.folder = folder
        self.setting = setting
        self.port = _find_free_port()
        self.room: dict = {"__name__": "page"}
        for name in CLONE:
            (folder / name).symlink_to(ROOT / name)
        programs = folder / "bin"
        programs.mkdir()
        for name, words in {"python": "", "sparsecut": "-m sparsecut "}.items():
            (programs / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {words}"$@"\n')
            (programs / name).chmod(0o755)
        if setting.prepare:
            setting.prepare(folder)

    def run(self) -> int:
        """Follow all blocks that are not marked, and return how many commands and codes ran."""
        number = 0
        try:
            for block in self.blocks:
                if not block.reason:
                    number += self.follow(block)
        finally:
            self.stop_server()
        return number

    def follow(self, block: Block) -> bool:
        """Do what a reader does with a block, and return whether something was run."""
        text = self.change(block.text)
        if block.file:
            file = self.folder / block.file
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        elif block.language == "bash":
            self.run_shell(text, block)
            return True
        elif block.language == "python":
            exec(compile("\n" * block.line + text, block.page, "exec"), self.room)
            return True
        return False

    def change(self, text: str) -> str:
        """A block's text with the changes of the setting."""
        for old, new in self.setting.changes:
            text = text.replace(old, new)
        return text.replace(PORT, str(self.port))

    def run_shell(self, text: str, block: Block) -> None:
        """Run a shell block; a server goes on in the background."""
        script = PRELUDE.replace(PORT, str(self.port)) + SERVER.sub("start_server ", text)
        places = [str(self.folder / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]]
        environment = {
            **os.environ,
            "PATH": os.pathsep.join(places),
            "PYTHONPATH": str(ROOT),
            "HF_HOME": str(self.folder / "cache"),
            "MASTER_PORT": str(_find_free_port()),
            "PET_MASTER_PORT": str(_find_free_port()),
        }
        with (self.folder / "output.log").open("w") as output:
            done = subprocess.run(
                ["bash", "-c", script],
                cwd=self.folder,
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        printed = (self.folder / "output.log").read_text()
        assert done.returncode == 0, f"{block}: exit code {done.returncode}\n{printed[-4000:]}"

    def stop_server(self) -> None:
        """End the server that the page has started last."""
        file = self.folder / "server.pid"
        if file.exists():
            subprocess.run(["kill", file.read_text().strip()], check=False)


def _find_free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def parse_shown(block: Block) -> set[str]:
    """Read a block of YAML or JSON that is only shown, and return the keys of its YAML."""
    if block.language == "json":
        json.loads(block.text)
        return set()
    shown = yaml.safe_load(block.text)
    assert isinstance(shown, dict), str(block)
    return set(shown)
