"""A program that trains, and kills itself (or is told to stop) where its first line of input says;
each run is a fork of its own.

python tests/killed.py FOLDER   reads lines "OUTPUT POINT", answers with the exit status of each run
"""

import os
import signal
import sys
from pathlib import Path

import torch
from helpers.runs import recipe, stage
from helpers.tiny import tiny_model

from sparsecut.training import run_dir as run_folder
from sparsecut.training import stages as training
from sparsecut.training.trainer import StageTrainer

STEPS = {
    "max_steps": 6,
    "save_strategy": "steps",
    "save_steps": 2,
    "save_total_limit": 1,
    "optim": "adamw_torch",
}


def train(folder: Path, output: str, resume: bool) -> None:
    """Two stages of six steps, a checkpoint after every second; with dropout, so that the random
    state counts.
    """
    stages = [
        stage(folder, train=["fusion"], args=STEPS),
        stage(folder, name="two", train=["fusion", "language"], args=STEPS),
    ]
    model, processor = tiny_model({"method": "sparsecut", "count": 2})
    for config in (model.config.text_config, model.language_model.config):
        config.attention_dropout = 0.3
    for layer in model.language_model.model.layers:
        layer.self_attn.attention_dropout = 0.3
    given = recipe(
        folder, *stages, output=str(folder / output), fusion={"method": "sparsecut", "count": 2}
    )
    training.train(given, model=model, processor=processor, shown=False, resume=resume)


def before(
    owner, name: str, when=lambda *args: True, do=lambda: os.kill(os.getpid(), signal.SIGKILL)
) -> None:
    """Have a function do something first, where `when` says so of its arguments."""
    own = getattr(owner, name)

    def changed(*args, **kwargs):
        if when(*args):
            do()
        return own(*args, **kwargs)

    setattr(owner, name, changed)


def at_step(name: str, step: int):
    """Whether a call of the trainer belongs to this step of this stage."""
    return lambda self, *args: self.stage.name == name and self.state.global_step == step


POINTS = {  # where a run is killed -> how that is brought about
    "first step": lambda: before(StageTrainer, "training_step", at_step("one", 0)),
    "between checkpoints": lambda: before(StageTrainer, "training_step", at_step("one", 3)),
    "model being written": lambda: before(
        StageTrainer, "_save", lambda self, *a: self.state.global_step == 4
    ),
    "optimizer being written": lambda: before(
        torch, "save", lambda what, path, *a: _half(path, "checkpoint-4/optimizer")
    ),
    "checkpoint not yet marked": lambda: before(
        run_folder, "_flush_to_disk", lambda path: "checkpoint-4" in str(path)
    ),
    "between the stages": lambda: before(
        training, "clear_stage", lambda folder, *a: folder.name == "two"
    ),
    "first stage being written": lambda: before(
        run_folder, "dump_recipe", lambda recipe, path: path.parent.name == "one"
    ),
    "second stage, late": lambda: before(StageTrainer, "training_step", at_step("two", 5)),
    "final being linked": lambda: before(os, "link"),
    "told to stop": lambda: before(
        StageTrainer,
        "training_step",
        at_step("two", 2),
        lambda: os.kill(os.getpid(), signal.SIGTERM),
    ),
}


def _half(path, piece: str) -> bool:
    if piece not in str(path):
        return False
    Path(path).write_bytes(b"half")
    return True


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    for line in sys.stdin:
        output, _, point = line.strip().partition(" ")
        child = os.fork()
        if not child:
            if point in POINTS:
                POINTS[point]()
            train(folder, output, resume=point == "resume")
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(status, flush=True)
