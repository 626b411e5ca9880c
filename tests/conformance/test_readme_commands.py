"""The README's shell blocks run as printed, one command after the other, in an empty folder."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def list_commands() -> list[str]:
    """The commands of all shell blocks that use `sparsecut`, in their order."""
    commands = []
    for block in re.findall(r"```bash\n(.*?)```", README, re.S):
        commands += [line for line in block.splitlines() if line.startswith("sparsecut ")]
    return commands


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An empty folder, in which every command leaves its files for the next."""
    return tmp_path_factory.mktemp("readme")


@pytest.mark.parametrize("command", list_commands())
def test_the_commands_run_as_printed(folder, command):
    # This checkout's command, whatever is installed.
    function = f'sparsecut() {{ "{sys.executable}" -m sparsecut "$@"; }}'
    done = subprocess.run(
        ["bash", "-c", f"{function}\n{command}"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


def test_the_commands_leave_what_the_readme_names(folder):
    assert (folder / "runs" / "tiny" / "final" / "config.json").is_file()
    assert (folder / "runs" / "tiny" / "again" / "result.json").is_file()
