"""`study`, `search` and `eval --tasks` are killed at any time, go on, and leave the same results.

SPARSECUT_KILLS says how often each is killed; the times are drawn by a seed.
"""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml
from helpers.playground import make_root
from helpers.studies import QUICK
from helpers.tiny import tiny_model

from sparsecut.building import save

ROOT = Path(__file__).parents[2]
KILLS = int(os.environ.get("SPARSECUT_KILLS", "4"))
# What may differ: times, memory, paths, and whether a model was in memory or read from its folder.
MAY_DIFFER = {
    "model",
    "seconds",
    "train_seconds",
    "eval_seconds",
    "num_kept",
    "memory_gib",
    "peak_bytes",
    "facts",
    "images",
    "output",
}
IGNORED = ("worker-", ".lock", "images.jsonl", "inputs.json", "trainer_state.json", "training_args")


def start(arguments: list[str], folder: Path) -> subprocess.Popen:
    """Start a command in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "sparsecut", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        text=True,
    )


def run_to_end(arguments: list[str], folder: Path) -> float:
    """Run a command; returns its seconds."""
    begin = time.monotonic()
    process = start(arguments, folder)
    output, _ = process.communicate()
    assert process.returncode == 0, output[-3000:]
    return time.monotonic() - begin


ENDS = (  # ways in which a command comes to its end
    lambda process: process.kill(),
    lambda process: os.killpg(process.pid, signal.SIGINT),  # as a terminal sends it
    lambda process: process.terminate(),
    lambda process: os.killpg(process.pid, signal.SIGKILL),
)


def list_session(number: int) -> list[int]:
    """Processes of a session."""
    found = []
    for pid in psutil.pids():
        with contextlib.suppress(ProcessLookupError):
            if os.getsid(pid) == number:
                found.append(pid)
    return found


def kill_often(arguments: list[str], folder: Path, seconds: float) -> None:
    """Kill a command at random times, the whole group or its first process, then let it end."""
    draw = random.Random(str(arguments))
    for number in range(KILLS):
        process = start(arguments, folder)
        time.sleep(draw.uniform(0.1, 1.0) * seconds)
        end = ENDS[number % len(ENDS)]
        end(process)
        output, _ = process.communicate()
        if process.returncode in (130, 143):  # else Python had not begun with the command
            assert "stopped by" in output
            assert not list_session(process.pid)
    run_to_end(arguments, folder)


def read_files(folder: Path) -> dict[str, object]:
    """Every file below a folder; JSON without times."""
    files = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_file() and not path.name.startswith(IGNORED):
            files[name] = read_file(path, folder)
    return files


def read_file(path: Path, folder: Path):
    """A file's contents, without times and without the folder's name."""
    if path.suffix not in (".json", ".jsonl", ".yaml", ".html", ".md"):
        return path.read_bytes()
    text = path.read_text().replace(str(folder), "FOLDER")
    if path.suffix == ".json":
        return drop_times(json.loads(text))
    if path.suffix == ".jsonl":
        return [drop_times(json.loads(line)) for line in text.splitlines()]
    return None if path.name.startswith("report") else text


def drop_times(value):
    """Plain values without what depends on the clock."""
    if isinstance(value, dict):
        return {key: drop_times(inner) for key, inner in value.items() if key not in MAY_DIFFER}
    if isinstance(value, list):
        return [drop_times(inner) for inner in value]
    return value


def check_equal(found: dict, expected: dict) -> None:
    assert set(found) == set(expected)
    for name, content in expected.items():
        if not name.endswith("report.json"):
            assert found[name] == content, name


@pytest.mark.parametrize("command", ["study", "search", "eval"])
def test_a_killed_command_goes_on_to_the_same_files(tmp_path, command):
    study = {**QUICK, "output": "out", "seeds": [3], "budgets": {"short": []}}
    for name in ("whole", "killed"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "study.yaml").write_text(yaml.safe_dump(study))
        if command == "eval":
            make_root(folder / "root")
            save(*tiny_model(), folder / "model")
    arguments = {
        "study": ["study", "study.yaml", "--workers", "2"],
        "search": ["search", "study.yaml", "--count", "2", "--rank", "2", "--workers", "1"],
        "eval": [
            *("eval", "model", "--tasks", "pope,mme,gqa,vqav2", "--root", "root"),
            "--out=out",
        ],
    }[command]
    seconds = run_to_end(arguments, tmp_path / "whole")
    kill_often(arguments, tmp_path / "killed", seconds)
    check_equal(read_files(tmp_path / "killed" / "out"), read_files(tmp_path / "whole" / "out"))
