"""A run that is killed, told to stop, or finds the disk full goes on as if nothing had happened,
and never from a broken checkpoint.
"""

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers.killed import POINTS
from helpers.runs import log, run, stage, write_records

from sparsecut.training import run_dir as run_folder
from sparsecut.training.trainer import StageTrainer

HERE = Path(__file__).parents[1]
CHECKPOINTS = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A function (output, point) -> exit status of a run, and the folder; an undisturbed run is in
    whole/.
    """
    folder = tmp_path_factory.mktemp("killed")
    write_records(folder)
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": f"{HERE}{os.pathsep}{HERE.parent}",
    }
    program = subprocess.Popen(
        [sys.executable, str(HERE / "helpers" / "killed.py"), str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment,
        text=True,
    )

    def go(output: str, point: str) -> int:
        program.stdin.write(f"{output} {point}\n")
        program.stdin.flush()
        return int(program.stdout.readline())

    assert go("whole", "undisturbed") == 0
    yield go, folder
    program.stdin.close()
    program.wait()


def test_dropout_takes_part(runs):
    """Or the comparison above would not see a random state that is lost."""
    _, folder = runs
    text = json.loads((folder / "whole" / "final" / "config.json").read_text())["text_config"]
    assert text["attention_dropout"] == 0.3


def weights(folder: Path, output: str) -> bytes:
    return (folder / output / "final" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("point", POINTS)
def test_a_killed_run_goes_on_to_the_bit(runs, point):
    go, folder = runs
    output = point.replace(" ", "-").replace(",", "")
    assert go(output, point) == (1 if point == "told to stop" else -9)
    assert go(output, "resume") == 0
    for name in ("one", "two"):
        kept, whole = (
            [
                {k: v for k, v in line.items() if k not in ("seconds", "memory_gib")}
                for line in log(folder, name, way)
            ]
            for way in (output, "whole")
        )
        assert kept == whole
    assert weights(folder, output) == weights(folder, "whole")


@pytest.fixture
def folder(tmp_path):
    """A folder with records and pictures."""
    write_records(tmp_path)
    return tmp_path


FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    "owner, name",
    [(StageTrainer, "_save"), (StageTrainer, "_save_rng_state"), (run_folder, "_flush_to_disk")],
)
def test_a_full_disk_leaves_the_last_checkpoint_and_the_run_can_go_on(
    folder, monkeypatch, owner, name
):
    own = getattr(owner, name)

    def full(*args, **kwargs):
        if "checkpoint-4" in str(args):
            raise FULL
        return own(*args, **kwargs)

    whole = run(folder, stage(folder, args=CHECKPOINTS), output=str(folder / "whole"))[0]
    monkeypatch.setattr(owner, name, full)
    with pytest.raises(
        OSError,
        match=(r"checkpoint-4 .*No space left.*checkpoint-2.*--resume"),
    ):
        run(folder, stage(folder, args=CHECKPOINTS))
    assert sorted(path.name for path in (folder / "out" / "one").glob("checkpoint-*")) == [
        "checkpoint-2"
    ]
    monkeypatch.setattr(owner, name, own)
    resumed = run(folder, stage(folder, args=CHECKPOINTS), resume=True)[0]
    states = whole.state_dict(), resumed.state_dict()
    assert all((states[0][key] == states[1][key]).all() for key in states[0])


def test_a_disk_that_is_too_small_is_told_before_the_first_step(folder, monkeypatch):
    monkeypatch.setattr(run_folder.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(
        ValueError,
        match=r"a checkpoint takes about .* GiB, but .* has 0.00 GiB free; free some space",
    ):
        run(folder)


def test_going_on_with_other_batches_is_refused(folder):
    run(folder, stage(folder, args=CHECKPOINTS))
    (folder / "out" / "one" / run_folder.FINISHED).unlink()
    for checkpoint in (folder / "out" / "one").glob("checkpoint-*"):
        facts = json.loads((checkpoint / run_folder.WHOLE).read_text())
        (checkpoint / run_folder.WHOLE).write_text(
            json.dumps({**facts, "global_batch": 8, "processes": 4})
        )
    with pytest.raises(
        ValueError,
        match=(
            r"written with 8 records a step \(4 processes\), but now a step has 2 \(1 processes\)"
        ),
    ):
        run(folder, stage(folder, args=CHECKPOINTS), resume=True)


def test_an_unfinished_run_is_not_started_over_by_accident(folder):
    run(folder, stage(folder, args=CHECKPOINTS))
    run(folder, stage(folder, args=CHECKPOINTS))  # a finished one may be repeated
    (folder / "out" / "one" / run_folder.FINISHED).unlink()
    with pytest.raises(ValueError, match=r"checkpoint-6.*--resume"):
        run(folder, stage(folder, args=CHECKPOINTS))
    changed = {**CHECKPOINTS, "save_steps": 3, "logging_steps": 2, "dataloader_num_workers": 1}
    run(folder, stage(folder, args=changed), resume=True)  # what changes no weight may change


def test_sigterm_outside_training_is_not_caught(folder):
    before = signal.getsignal(signal.SIGTERM)
    run(folder)
    assert signal.getsignal(signal.SIGTERM) is before
