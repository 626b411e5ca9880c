"""What a run leaves on disk, and what of it is whole: the part of training that a power cut, a full
disk or a kill must not spoil.

Everything that counts is marked by a file that is written last. What lacks its mark was being written when the run ended: it is
removed, and the run goes on from what was whole before.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import shutil
from dataclasses import replace
from pathlib import Path

from transformers.utils import logging as hf_logging

from ..adapters import FOLDER as ADAPTERS
from ..config.recipe import Recipe, dump_recipe, load_recipe
from ..schema import UserError

FINISHED = "versions.json"  # written last, so a stage that has it is whole
SKIPPED = "skipped.txt"  # sentences about records that were left out
WHOLE = "whole.json"  # the same for a checkpoint inside a stage


HARMLESS = (
    "logging",
    "save",
    "report_to",
    "run_name",
    "dataloader",
    "fsdp",
    "deepspeed",
    "ddp",
    "push_to_hub",
    "hub",
    "disable_tqdm",
)
GIB = 2**30


def check_output(recipe: Recipe, output: Path, *, resume: bool) -> None:
    """Refuse to write over another experiment, or over checkpoints of an unfinished run that nobody
    said to go on with.

    The same recipe may be run again after it has finished, as it gives the same.
    """
    written = output / "config.yaml"
    if not written.is_file():
        return
    before = load_recipe(written)
    same = {
        name: getattr(before, name) == getattr(recipe, name) for name in ("model", "fusion", "seed")
    }
    same["stages"] = _decisive(before) == _decisive(recipe)
    if changed := [name for name, equal in same.items() if not equal]:
        raise UserError(
            f"{output} holds a run of another recipe (it differs in {', '.join(changed)}); choose"
            " another folder (output=...) or remove this one"
        )
    done = finished(recipe, output)
    if resume or done == len(recipe.stages):
        return
    if (kept := last_checkpoint(output / recipe.stages[done].name)) or done:
        raise UserError(
            f"{output} holds an unfinished run, whole as far as"
            f" {kept or recipe.stages[done - 1].name}; add --resume to go on from there, choose"
            " another folder (output=...), or remove this one to start over"
        )


def _decisive(recipe: Recipe) -> list:
    """The stages without arguments that may differ between a run and its continuation."""
    kept = [
        {k: v for k, v in stage.args.items() if not k.startswith(HARMLESS)}
        for stage in recipe.stages
    ]
    return [replace(stage, args=args) for stage, args in zip(recipe.stages, kept, strict=True)]


def finished(recipe: Recipe, output: Path) -> int:
    """How many stages are whole on disk, from the first on."""
    whole = [(output / stage.name / FINISHED).is_file() for stage in recipe.stages]
    return whole.index(False) if False in whole else len(whole)


def last_checkpoint(folder: Path) -> Path | None:
    """The last checkpoint of a stage that is whole."""
    steps = {
        path: re.fullmatch(r"checkpoint-(\d+)", path.name) for path in folder.glob("checkpoint-*")
    }
    whole = {
        int(found[1]): path for path, found in steps.items() if found and (path / WHOLE).is_file()
    }
    return whole[max(whole)] if whole else None


def mark_whole(folder: Path, facts: dict) -> None:
    """Say that a checkpoint is complete, once everything else of it is on disk; facts: what a
    continuation must agree with.
    """
    for path in folder.rglob("*"):
        if path.is_file():
            _sync(path)
    (folder / WHOLE).write_text(json.dumps(facts) + "\n", encoding="utf-8")
    _sync(folder / WHOLE)


def check_continues(checkpoint: Path, facts: dict, stage: str) -> None:
    """Raise ValueError where a run would go on from a checkpoint with other batches than it was
    made with.
    """
    before = json.loads((checkpoint / WHOLE).read_text(encoding="utf-8"))
    if before["global_batch"] != facts["global_batch"]:
        raise UserError(
            f"stage {stage}: {checkpoint} was written with {before['global_batch']} records a step"
            f" ({before['processes']} processes), but now a step has {facts['global_batch']}"
            f" ({facts['processes']} processes), so batches would be missed or seen twice; keep"
            " per_device_train_batch_size x gradient_accumulation_steps x processes as it was"
        )


def clear_stage(folder: Path, *, resume: bool, main: bool) -> Path | None:
    """The checkpoint to go on from; what is not whole, and without resuming every leftover of a
    finished run, is removed.
    """
    kept = last_checkpoint(folder) if resume else None
    if main:
        if not resume:
            for left in (FINISHED, SKIPPED):
                (folder / left).unlink(missing_ok=True)
        for old in folder.glob("checkpoint-*"):
            if not (resume and (old / WHOLE).is_file()):
                shutil.rmtree(old, ignore_errors=True)
    return kept


def check_room(folder: Path, needed: int, stage: str) -> None:
    """Raise ValueError where the disk of `folder` has no room for `needed` bytes of weights and
    optimizer states.
    """
    place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if needed > (free := shutil.disk_usage(place).free):
        raise UserError(
            f"stage {stage}: a checkpoint takes about {needed / GIB:.2f} GiB, but {place} has"
            f" {free / GIB:.2f} GiB free; free some space, choose another disk (output=...), or"
            " keep fewer checkpoints (args: save_total_limit, save_only_model)"
        )


def not_written(error: Exception, checkpoint: Path, stage: str) -> OSError:
    """The error that says what is left after a checkpoint could not be written; what was written of
    it is removed.
    """
    shutil.rmtree(checkpoint, ignore_errors=True)
    kept = last_checkpoint(checkpoint.parent)
    left = f"the last whole one is {kept}" if kept else "there is none before it"
    free = shutil.disk_usage(checkpoint.parent).free
    return OSError(
        f"stage {stage}: {checkpoint.name} could not be written ({error}; {free / GIB:.2f} GiB are"
        f" free on that disk); {left}; make room and go on with --resume"
    )


def save_stage(trainer, processor, recipe: Recipe, folder: Path) -> None:
    """Write a stage's model and processor, and what they were made with; the file that says it is
    whole comes last.
    """
    shown = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()  # a bar per shard would break ours
    trainer.save_model(str(folder))
    if shown:
        hf_logging.enable_progress_bar()
    if trainer.is_world_process_zero():
        (folder / "training_args.bin").unlink(
            missing_ok=True
        )  # a pickle of what config.yaml says in words
        processor.save_pretrained(folder)
        dump_recipe(recipe, folder / "config.yaml")
        (folder / "plan.json").write_text(json.dumps(trainer.model.plan.to_dict(), indent=1) + "\n")
        packages = (
            "sparsecut",
            "torch",
            "transformers",
            "accelerate",
            "tokenizers",
            "pillow",
            "numpy",
        )
        versions = {name: importlib.metadata.version(name) for name in packages}
        versions |= {
            "python": platform.python_version(),
            "platform": platform.platform(),
            "seed": recipe.seed,
        }
        (folder / FINISHED).write_text(json.dumps(versions, indent=1) + "\n")
    trainer.accelerator.wait_for_everyone()


def link_all(source: Path, target: Path) -> None:
    """The stage's files under a second name, without taking the space twice where the disk can do
    that.
    """
    for path in [*source.iterdir(), *(source / ADAPTERS).rglob("*")]:
        if not path.is_file() or path.name == "log.jsonl":
            continue
        linked = target / path.relative_to(source)
        linked.parent.mkdir(parents=True, exist_ok=True)
        linked.unlink(missing_ok=True)
        try:
            os.link(path, linked)
        except OSError:
            shutil.copy2(path, linked)


def _sync(path: Path) -> None:
    """Have a file's contents on the disk, not only on their way to it."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
