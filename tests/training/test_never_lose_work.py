"""A run that is killed, gets SIGTERM, or finds the disk full continues as if undisturbed.

It never continues from a broken checkpoint.
"""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.killed import POINTS
from helpers.runs import log, run, stage, write_records

from sparsecut.training import checkpoints, run_dir
from sparsecut.training.trainer import StageTrainer

TESTS = Path(__file__).parents[1]
CHECKPOINTS = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with records and images."""
    return write_records(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def start(folder):
    """A function (output, point) -> exit status of a run in a process of its own."""
    path = os.pathsep.join([str(TESTS), str(TESTS.parent)])
    program = subprocess.Popen(
        [sys.executable, str(TESTS / "helpers" / "killed.py"), str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        text=True,
    )

    def start(output: str, point: str) -> int:
        program.stdin.write(f"{output} {point}\n")
        program.stdin.flush()
        return int(program.stdout.readline())

    yield start
    program.stdin.close()
    program.wait()


def read_final(folder: Path, output: str) -> bytes:
    return (folder / output / "final" / "model.safetensors").read_bytes()


def read_figures(folder: Path, output: str, name: str) -> list[dict]:
    """A stage's log, without what differs from run to run."""
    varying = ("seconds", "memory_gib")
    lines = log(folder, name, output)
    return [{key: line[key] for key in line if key not in varying} for line in lines]


def test_a_run_that_is_killed_at_every_point_gives_the_same_to_the_bit(folder, start):
    assert start("whole", "undisturbed") == 0
    for number, point in enumerate(POINTS):
        status = start("killed", f"{point} resume" if number else point)
        assert status == (1 if point == "SIGTERM" else -signal.SIGKILL), point
    assert start("killed", "undisturbed resume") == 0
    for name in ("one", "two"):
        assert read_figures(folder, "killed", name) == read_figures(folder, "whole", name)
    assert read_final(folder, "killed") == read_final(folder, "whole")
    # Without dropout a random state that is lost would not be seen.
    config = json.loads((folder / "whole" / "final" / "config.json").read_text())
    assert config["text_config"]["attention_dropout"] == 0.3


@pytest.fixture(scope="module")
def whole(folder):
    """Weights of a run with checkpoints, which is in folder/checkpointed."""
    model, _ = run(folder, stage(folder, args=CHECKPOINTS), output=str(folder / "checkpointed"))
    return model.state_dict()


@pytest.mark.parametrize(
    "owner, name",
    [(StageTrainer, "_save"), (StageTrainer, "_save_rng_state"), (checkpoints, "_flush_to_disk")],
)
def test_a_full_disk_leaves_the_last_checkpoint_and_the_run_can_continue(
    folder, whole, tmp_path, monkeypatch, owner, name
):
    original = getattr(owner, name)

    def fail(*args, **kwargs):
        if "checkpoint-4" in str(args):
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(*args, **kwargs)

    plain = stage(folder, args=CHECKPOINTS)
    monkeypatch.setattr(owner, name, fail)
    with pytest.raises(OSError, match=r"checkpoint-4 .*No space left.*checkpoint-2.*--resume"):
        run(folder, plain, output=str(tmp_path))
    assert [path.name for path in (tmp_path / "one").glob("checkpoint-*")] == ["checkpoint-2"]
    monkeypatch.setattr(owner, name, original)
    resumed, _ = run(folder, plain, output=str(tmp_path), resume=True)
    for key, value in resumed.state_dict().items():
        assert torch.equal(value, whole[key]), key


def test_a_disk_that_is_too_small_is_an_error_before_the_first_step(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(ValueError, match=r"stage one: .*0\.00 GiB"):
        run(folder, output=str(tmp_path))


def test_continuing_with_other_batches_is_refused(folder, tmp_path):
    run(folder, stage(folder, args=CHECKPOINTS), output=str(tmp_path))
    (tmp_path / "one" / run_dir.FINISHED).unlink()
    for checkpoint in (tmp_path / "one").glob("checkpoint-*"):
        facts = {"global_batch": 8, "processes": 4}
        (checkpoint / checkpoints.WHOLE).write_text(json.dumps(facts))
        for number in range(4):
            shutil.copy(checkpoint / "rng_state.pth", checkpoint / f"rng_state_{number}.pth")
    with pytest.raises(ValueError, match=r"8 records .*4 processes.* 2 \(1 processes"):
        run(folder, stage(folder, args=CHECKPOINTS), output=str(tmp_path), resume=True)


def test_an_unfinished_run_is_not_started_over_by_accident(folder, tmp_path):
    output = str(tmp_path)
    run(folder, stage(folder, args=CHECKPOINTS), output=output)
    (tmp_path / "one" / run_dir.FINISHED).unlink()
    with pytest.raises(ValueError, match=r"checkpoint-4.*--resume.*--overwrite"):
        run(folder, stage(folder, args=CHECKPOINTS), output=output)
    changed = {**CHECKPOINTS, "save_steps": 3, "logging_steps": 2, "dataloader_num_workers": 1}
    run(folder, stage(folder, args=changed), output=output, resume=True)


def test_sigterm_outside_training_is_not_caught(folder, tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    run(folder, output=str(tmp_path))
    assert signal.getsignal(signal.SIGTERM) is before
