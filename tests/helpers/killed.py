"""A program that trains and kills itself at the point its input names; each run is a fork.

python tests/helpers/killed.py FOLDER

It reads lines "OUTPUT POINT [resume]" and answers each with the exit status of the run. A point is
a name of POINTS, or anything else for a run that is not disturbed.
"""

import gc
import os
import signal
import sys
from pathlib import Path

import torch
from helpers.runs import recipe, stage
from helpers.tiny import tiny_model

from sparsecut import train
from sparsecut.training import checkpoints, run_dir, stages
from sparsecut.training.trainer import StageTrainer

FUSION = {"method": "sparsecut", "count": 2}
STEPS = {
    "max_steps": 4,
    "save_strategy": "steps",
    "save_steps": 2,
    "save_total_limit": 1,
    "optim": "adamw_torch",
}


def run(folder: Path, output: str, *, resume: bool) -> None:
    """Run two stages of four steps, a checkpoint after every second.

    The model has dropout, so that the random state counts.
    """
    first = stage(folder, train=["fusion"], args=STEPS)
    second = stage(folder, name="two", train=["fusion", "language"], args=STEPS)
    model, processor = tiny_model(FUSION)
    for config in (model.config.text_config, model.language_model.config):
        config.attention_dropout = 0.3
    for layer in model.language_model.model.layers:
        layer.self_attn.attention_dropout = 0.3
    given = recipe(folder, first, second, output=str(folder / output), fusion=FUSION)
    train(given, model=model, processor=processor, shown=False, resume=resume)


def kill() -> None:
    """End this process as a power cut would."""
    os.kill(os.getpid(), signal.SIGKILL)


def terminate() -> None:
    """Ask this process to end, as a batch system does."""
    os.kill(os.getpid(), signal.SIGTERM)


def insert_before(owner, name: str, condition=lambda *args: True, action=kill) -> None:
    """Let a function do something first, where a condition holds for its arguments."""
    original = getattr(owner, name)

    def changed(*args, **kwargs):
        if condition(*args):
            action()
        return original(*args, **kwargs)

    setattr(owner, name, changed)


def is_step(name: str, step: int):
    """A condition: a call of the trainer belongs to this step of this stage."""
    return lambda trainer, *args: trainer.stage.name == name and trainer.state.global_step == step


def write_half(contents, path, *args) -> bool:
    """Write a part of the optimizer's file; False for other files."""
    if "checkpoint-4/optimizer" not in str(path):
        return False
    Path(path).write_bytes(b"half")
    return True


# Where a run is killed, in the order in which a run comes by: arguments of `insert_before`.
POINTS = {
    "first step": (StageTrainer, "training_step", is_step("one", 0)),
    "between checkpoints": (StageTrainer, "training_step", is_step("one", 3)),
    "model being written": (StageTrainer, "_save", lambda self, *a: self.state.global_step == 4),
    "optimizer being written": (torch, "save", write_half),
    "checkpoint not yet marked": (
        checkpoints,
        "_flush_to_disk",
        lambda path: "checkpoint-4" in str(path),
    ),
    "first stage being written": (
        run_dir,
        "dump_recipe",
        lambda recipe, path: path.parent.name == "one",
    ),
    "between the stages": (stages, "find_start", lambda folder, *a: folder.name == "two"),
    "SIGTERM": (StageTrainer, "training_step", is_step("two", 1), terminate),
    "second stage, late": (StageTrainer, "training_step", is_step("two", 3)),
    "final being linked": (os, "link"),
}


def main() -> None:
    """Do what the lines of the input ask for."""
    gc.freeze()  # or every run would look through all that is imported
    folder = Path(sys.argv[1])
    for line in sys.stdin:
        output, _, point = line.strip().partition(" ")
        resume = point.endswith(" resume")
        point = point.removesuffix(" resume")
        child = os.fork()
        if not child:
            if point in POINTS:
                insert_before(*POINTS[point])
            run(folder, output, resume=resume)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()
