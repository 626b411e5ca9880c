"""What a run leaves on disk, and which of it is complete.

This is the part of training that a power cut, a full disk or a kill must not spoil. Every stage and
every checkpoint has a marker file, which is written last. What lacks its marker was being written
when the run ended: it is removed, and the run goes on from what was complete before.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers.utils import logging as hf_logging

from ..adapters import FOLDER as ADAPTERS
from ..config.paths import check_writable_folder
from ..config.recipe import Recipe, Stage, dump_recipe, load_recipe
from ..schema import UserError, read_json_file

FINISHED = "versions.json"  # the marker of a stage
WHOLE = "whole.json"  # the marker of a checkpoint inside a stage
SKIPPED = "skipped.txt"  # one line about each record that was left out
PACKAGES = ("sparsecut", "torch", "transformers", "accelerate", "tokenizers", "pillow", "numpy")
GIB = 2**30
# Arguments that may differ between a run and its continuation, by the beginning of their names.
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


def check_output(recipe: Recipe, output: Path, *, resume: bool) -> None:
    """Check that a run may write to its output folder.

    The same recipe may run again after it has finished, because it gives the same result.

    Args:
        recipe: The recipe that is to run.
        output: Its output folder, which need not exist.
        resume: Whether an unfinished run there is to be continued.

    Raises:
        UserError: If the folder holds a run of another recipe, or an unfinished run that is not to
            be continued.
    """
    check_writable_folder(output)
    recipe_file = output / "config.yaml"
    if not recipe_file.is_file():
        return
    changed = _find_differences(load_recipe(recipe_file), recipe)
    if changed:
        raise UserError(
            f"{output} holds a run of another recipe (it differs in {', '.join(changed)}); choose"
            " another folder (output=...) or remove this one"
        )
    num_finished = count_finished_stages(recipe, output)
    if num_finished == len(recipe.stages):
        return
    complete = last_checkpoint(output / recipe.stages[num_finished].name)
    if resume:
        if complete is not None:
            check_intact(complete)
        return
    if complete is None and num_finished:
        complete = recipe.stages[num_finished - 1].name
    if complete is not None:
        raise UserError(
            f"{output} holds an unfinished run, complete up to {complete}; add --resume to go on"
            " from there, choose another folder (output=...), or remove this one to start over"
        )


def _find_differences(previous: Recipe, recipe: Recipe) -> list[str]:
    """Keys in which two recipes differ so that one cannot continue the other."""
    changed = [
        name
        for name in ("model", "fusion", "seed")
        if getattr(previous, name) != getattr(recipe, name)
    ]
    if _comparable_stages(previous) != _comparable_stages(recipe):
        changed.append("stages")
    return changed


def _comparable_stages(recipe: Recipe) -> list[Stage]:
    """The stages without the arguments that may differ between a run and its continuation."""
    stages = []
    for stage in recipe.stages:
        args = {name: v for name, v in stage.args.items() if not name.startswith(HARMLESS)}
        stages.append(replace(stage, args=args))
    return stages


def count_finished_stages(recipe: Recipe, output: Path) -> int:
    """Number of stages that are complete on disk, from the first on."""
    for number, stage in enumerate(recipe.stages):
        if not (output / stage.name / FINISHED).is_file():
            return number
    return len(recipe.stages)


def last_checkpoint(folder: Path) -> Path | None:
    """The last complete checkpoint of a stage, None where there is none."""
    complete: dict[int, Path] = {}
    for path in folder.glob("checkpoint-*"):
        match = re.fullmatch(r"checkpoint-(\d+)", path.name)
        if match and (path / WHOLE).is_file():
            complete[int(match[1])] = path
    return complete[max(complete)] if complete else None


def check_intact(checkpoint: Path) -> None:
    """Raise UserError where a file of a complete checkpoint was lost or damaged afterwards."""
    try:
        facts = read_json_file(checkpoint / WHOLE)
        if not {"global_batch", "processes"} <= set(facts):
            raise UserError(f"{checkpoint / WHOLE} lacks the size of its batches")
        read_json_file(checkpoint / "trainer_state.json")
        _check_weight_files(checkpoint)
    except (UserError, OSError, SafetensorError) as error:
        raise UserError(
            f"the checkpoint {checkpoint} is damaged: {error}; remove that folder and run again with"
            " --resume, which continues from what was complete before it"
        ) from error


def _check_weight_files(checkpoint: Path) -> None:
    """Open every file of weights without reading it; both formats know how long they are."""
    weights = list(checkpoint.rglob("*.safetensors"))
    is_sharded = any(path.is_dir() for path in checkpoint.iterdir())
    if not weights and not is_sharded:
        raise UserError("it holds no weights")
    for file in weights:
        with safe_open(file, "pt"):
            pass
    # save_only_model leaves both out; FSDP calls the optimizer's file optimizer.bin.
    has_optimizer = any((checkpoint / f"optimizer.{ending}").is_file() for ending in ("pt", "bin"))
    has_scheduler = (checkpoint / "scheduler.pt").is_file()
    if has_optimizer != has_scheduler and not is_sharded:
        lost = "scheduler.pt" if has_optimizer else "optimizer.pt"
        raise UserError(f"{lost} is missing")
    for file in (*checkpoint.glob("*.pt"), *checkpoint.glob("*.pth")):
        if not zipfile.is_zipfile(file):
            raise UserError(f"{file.name} is not what torch has saved")


def mark_complete(folder: Path, batch_facts: dict) -> None:
    """Write a checkpoint's marker, once everything else of it is on disk.

    Args:
        folder: The checkpoint.
        batch_facts: What a continuation must agree with, see `StageTrainer.batch_facts`.
    """
    for path in folder.rglob("*"):
        if path.is_file():
            _flush_to_disk(path)
    (folder / WHOLE).write_text(json.dumps(batch_facts) + "\n", encoding="utf-8")
    _flush_to_disk(folder / WHOLE)


def check_same_batches(checkpoint: Path, batch_facts: dict) -> None:
    """Raise UserError where a run would continue a checkpoint with batches of another size."""
    before = read_json_file(checkpoint / WHOLE)
    if before["global_batch"] != batch_facts["global_batch"]:
        raise UserError(
            f"{checkpoint} was written with {before['global_batch']} records a step"
            f" ({before['processes']} processes), but now a step has"
            f" {batch_facts['global_batch']} ({batch_facts['processes']} processes), so records"
            " would be missed or seen twice; keep per_device_train_batch_size x"
            " gradient_accumulation_steps x processes as it was"
        )


def clear_stage(folder: Path, *, resume: bool, main: bool) -> Path | None:
    """Remove what is incomplete and, without resuming, every leftover of a finished run.

    Args:
        folder: The stage's folder.
        resume: Whether to keep complete checkpoints.
        main: Whether this process writes; the others only look.

    Returns:
        The checkpoint to continue from, None to start from the beginning.
    """
    checkpoint = last_checkpoint(folder) if resume else None
    if not main:
        return checkpoint
    if not resume:
        for name in (FINISHED, SKIPPED):
            (folder / name).unlink(missing_ok=True)
    for path in folder.glob("checkpoint-*"):
        if not (resume and (path / WHOLE).is_file()):
            shutil.rmtree(path, ignore_errors=True)
    return checkpoint


def check_disk_space(folder: Path, num_bytes: int) -> None:
    """Raise UserError where the disk of a folder lacks room for so many bytes of checkpoints."""
    place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(place).free
    if num_bytes > free:
        raise UserError(
            f"a checkpoint takes about {num_bytes / GIB:.2f} GiB, but {place} has"
            f" {free / GIB:.2f} GiB free; free some space, choose another disk (output=...), or"
            " keep fewer checkpoints (args: save_total_limit, save_only_model)"
        )


def discard_checkpoint(checkpoint: Path, error: Exception, stage: str) -> OSError:
    """Remove a checkpoint that could not be written.

    Args:
        checkpoint: Its folder.
        error: What went wrong.
        stage: The stage's name.

    Returns:
        An error to raise, which names the last complete checkpoint.
    """
    shutil.rmtree(checkpoint, ignore_errors=True)
    previous = last_checkpoint(checkpoint.parent)
    left = f"the last complete one is {previous}" if previous else "there is none before it"
    free = shutil.disk_usage(checkpoint.parent).free
    return OSError(
        f"stage {stage}: {checkpoint.name} could not be written ({error}; {free / GIB:.2f} GiB are"
        f" free on that disk); {left}; make room and go on with --resume"
    )


def save_stage(trainer, processor, recipe: Recipe, folder: Path) -> None:
    """Write a stage's model and processor, and how they were made.

    Args:
        trainer: The stage's trainer, on every process.
        processor: The model's processor.
        recipe: The recipe that is running.
        folder: The stage's folder.
    """
    had_bar = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()  # a bar for each shard would break ours
    trainer.save_model(str(folder))
    if had_bar:
        hf_logging.enable_progress_bar()
    if trainer.is_world_process_zero():
        # A pickle of what config.yaml holds as text.
        (folder / "training_args.bin").unlink(missing_ok=True)
        processor.save_pretrained(folder)
        dump_recipe(recipe, folder / "config.yaml")
        plan = json.dumps(trainer.model.plan.to_dict(), indent=1)
        (folder / "plan.json").write_text(plan + "\n")
        versions = json.dumps(_collect_versions(recipe.seed), indent=1)
        (folder / FINISHED).write_text(versions + "\n")  # last: the marker of the stage
    trainer.accelerator.wait_for_everyone()


def _collect_versions(seed: int) -> dict:
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    versions["python"] = platform.python_version()
    versions["platform"] = platform.platform()
    versions["seed"] = seed
    return versions


def link_files(source: Path, target: Path) -> None:
    """Give a stage's files a second name, or copy them where the disk has no hard links."""
    for path in [*source.iterdir(), *(source / ADAPTERS).rglob("*")]:
        if not path.is_file() or path.name == "log.jsonl":
            continue
        link = target / path.relative_to(source)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)
        try:
            os.link(path, link)
        except OSError:
            shutil.copy2(path, link)


def _flush_to_disk(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
