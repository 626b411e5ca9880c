"""What a run leaves on disk: what may be written, continued, replaced and removed.

This is the part of training that a power cut, a full disk or a kill must not spoil. Every stage has
a marker file, which is written last (`checkpoints` does the same inside a stage). What is not of a
run of ours is neither removed nor written over, and what is, only where the user says so.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from ..config.paths import check_writable_folder, list_code_files
from ..config.recipe import Recipe, Stage, dump_recipe, load_recipe
from ..evaluation.output_dir import PREDICTIONS, RESULT, SETTINGS
from ..schema import UserError, read_text_file, write_text_file
from .checkpoints import (
    check_intact,
    check_known,
    find_checkpoints,
    last_checkpoint,
    remove_incomplete,
)

RECIPE = "config.yaml"
INPUTS = "inputs.json"  # what the run was made from
FINISHED = "versions.json"  # the marker of a stage
LOG = "log.jsonl"
SKIPPED = "skipped.txt"  # one line about each record that was left out
FINAL = "final"
ADAPTERS = "adapters"  # as `adapters` names it; this file is imported before any model library
PACKAGES = ("sparsecut", "torch", "transformers", "accelerate", "tokenizers", "pillow", "numpy")
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
HARMFUL = ("dataloader_drop_last",)  # begins as a harmless one does, but changes batches
# What a stage's folder holds of ours. A file of the same folder with another name stays.
STAGE_FILES = (
    RECIPE,
    "plan.json",
    LOG,
    SKIPPED,
    "training_args.bin",
    "model.safetensors",
    "model-*-of-*.safetensors",
    "model.safetensors.index.json",
    "fusion.safetensors",
    "fusion.json",
    "config.json",
    "generation_config.json",
    "*processor_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    f"{ADAPTERS}/*/adapter_config.json",
    f"{ADAPTERS}/*/adapter_model.safetensors",
    f"{ADAPTERS}/*/README.md",
)


def check_output(
    recipe: Recipe,
    output: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    check: bool = False,
) -> None:
    """Check that a run may write to its output folder.

    Args:
        recipe: The recipe that is to run.
        output: Its output folder, which need not exist.
        resume: Whether an unfinished run there is to be continued.
        overwrite: Whether a run there is to be replaced.
        check: Whether the run only checks its recipe, and writes nothing.

    Raises:
        UserError: If the folder holds a run of another recipe, a run that is neither to be
            continued nor replaced, a checkpoint that cannot be continued, or something else under a
            name that the run needs.
    """
    if resume and overwrite:
        raise UserError("a run is either continued or replaced; give one of --resume, --overwrite")
    check_writable_folder(output)
    previous = read_previous(output)
    _check_names_are_free(recipe, previous, output)
    if previous is None or overwrite or not _has_trained(previous, output):
        return
    changed = _find_differences(previous, recipe, has_facts=(output / INPUTS).is_file())
    if changed:
        raise UserError(
            f"{output} holds a run of another recipe (it differs in {', '.join(changed)}); choose"
            " another folder (output=...), or add --overwrite to replace that run"
        )
    if resume:
        _check_continues(recipe, output)
    elif not check:
        _refuse_previous(recipe, output)


def read_previous(output: Path) -> Recipe | None:
    """The recipe of the run that a folder holds, None where it holds none.

    Raises:
        UserError: The folder has a file of that name, but it is no recipe.
    """
    file = output / RECIPE
    if not file.is_file():
        return None
    try:
        return load_recipe(file)
    except UserError as error:
        raise UserError(
            f"{output} holds a {RECIPE} that is not the recipe of a run ({error}); choose another"
            " folder (output=...), or move that file away"
        ) from error


def _check_names_are_free(recipe: Recipe, previous: Recipe | None, output: Path) -> None:
    """Raise UserError where something that is not ours has a name that the run needs."""
    ours = set() if previous is None else set(_name_folders(previous))
    for name in _name_folders(recipe):
        path = output / name
        if name in ours or not path.exists():
            continue
        if not path.is_dir() or any(path.iterdir()):
            raise UserError(
                f"{path} is there already, but no run of this folder has written it; choose another"
                " folder (output=...), or move it away"
            )


def _name_folders(recipe: Recipe) -> list[str]:
    return [*(stage.name for stage in recipe.stages), FINAL]


def _has_trained(recipe: Recipe, output: Path) -> bool:
    """Whether a run has taken a step that it logged, or has written weights."""
    for name in _name_folders(recipe):
        folder = output / name
        log = folder / LOG
        has_log = log.is_file() and log.stat().st_size > 0
        if has_log or (folder / FINISHED).is_file() or find_checkpoints(folder):
            return True
    return False


def _check_continues(recipe: Recipe, output: Path) -> None:
    """Raise UserError where a run's last checkpoint cannot be continued."""
    num_finished = count_finished_stages(recipe, output)
    if num_finished == len(recipe.stages):
        return
    folder = output / recipe.stages[num_finished].name
    check_known(folder)
    complete = last_checkpoint(folder)
    if complete is not None:
        check_intact(complete)


def _refuse_previous(recipe: Recipe, output: Path) -> None:
    """Raise UserError: the folder holds this run, finished or not."""
    num_finished = count_finished_stages(recipe, output)
    if num_finished == len(recipe.stages):
        raise UserError(
            f"{output} holds this run, and it is finished; its model is {output / FINAL}; choose"
            " another folder (output=...), or add --overwrite to train anew and replace it"
        )
    complete = last_checkpoint(output / recipe.stages[num_finished].name)
    if complete is None and num_finished:
        complete = output / recipe.stages[num_finished - 1].name
    state = f"complete up to {complete}" if complete else "without a complete checkpoint"
    raise UserError(
        f"{output} holds an unfinished run, {state}; add --resume to go on with it, --overwrite to"
        " start over and replace it, or choose another folder (output=...)"
    )


def _find_differences(previous: Recipe, recipe: Recipe, *, has_facts: bool) -> list[str]:
    """Keys in which two recipes differ so that one cannot continue the other.

    Args:
        previous: The recipe of the run on disk.
        recipe: The recipe of now.
        has_facts: Whether the run notes what it read, so that data may lie elsewhere now.
    """
    changed = [
        name
        for name in ("model", "fusion", "seed")
        if getattr(previous, name) != getattr(recipe, name)
    ]
    if _comparable_stages(previous, has_facts) != _comparable_stages(recipe, has_facts):
        changed.append("stages")
    if (previous.feature_cache is None) != (recipe.feature_cache is None):
        changed.append("feature_cache")  # cached features are rounded
    return changed


def _comparable_stages(recipe: Recipe, has_facts: bool) -> list[Stage]:
    """The stages without what may differ between a run and its continuation."""
    stages = []
    for stage in recipe.stages:
        args = {}
        for name, value in stage.args.items():
            if name in HARMFUL or not name.startswith(HARMLESS):
                args[name] = value
        data = stage.data
        if has_facts:
            data = tuple(replace(source, path="", images=None) for source in data)
        stages.append(replace(stage, args=args, data=data))
    return stages


def is_begun(recipe: Recipe, output: Path) -> bool:
    """Whether there is something complete, but not all, that a run may be continued from."""
    num_finished = count_finished_stages(recipe, output)
    if num_finished == len(recipe.stages):
        return False
    folder = output / recipe.stages[num_finished].name
    return num_finished > 0 or last_checkpoint(folder) is not None


def count_finished_stages(recipe: Recipe, output: Path) -> int:
    """Number of stages that are complete on disk, from the first on."""
    for number, stage in enumerate(recipe.stages):
        if not (output / stage.name / FINISHED).is_file():
            return number
    return len(recipe.stages)


def remove_run(output: Path, previous: Recipe) -> None:
    """Remove what a run has written, and leave everything else in its folders.

    Args:
        output: The run's folder.
        previous: The recipe of that run.
    """
    from ..card import CARD, is_unedited

    folders = [output / name for name in _name_folders(previous)]
    for folder in folders:
        # First, so that what is left by an interruption does not count as complete.
        (folder / FINISHED).unlink(missing_ok=True)
    for folder in folders:
        for checkpoint in find_checkpoints(folder).values():
            shutil.rmtree(checkpoint)
        card = folder / CARD
        cards = [CARD] if card.is_file() and is_unedited(read_text_file(card)) else []
        _remove_files(folder, [*STAGE_FILES, *list_code_files(), *cards])
    if previous.evaluate is not None:
        _remove_files(output / "eval", (RESULT, PREDICTIONS, SETTINGS))
    _remove_files(output, (SKIPPED, INPUTS))


def _remove_files(folder: Path, patterns: Iterable[str]) -> None:
    """Remove files from a folder, and the folders that are empty then."""
    emptied = {folder}
    for pattern in patterns:
        for path in folder.glob(pattern):
            if path.is_file() or path.is_symlink():
                path.unlink()
                emptied |= {parent for parent in path.parents if folder in parent.parents}
    for path in sorted(emptied, reverse=True):
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()


def find_start(folder: Path, *, resume: bool, main: bool) -> Path | None:
    """Find where a stage begins, and remove what was being written when it ended.

    Args:
        folder: The stage's folder.
        resume: Whether to go on from a complete checkpoint.
        main: Whether this process writes; the others only look.

    Returns:
        The checkpoint to continue from, None to start from the beginning.
    """
    if main:
        remove_incomplete(folder)
    return last_checkpoint(folder) if resume else None


def write_recipe(recipe: Recipe, output: Path) -> None:
    """Write the recipe of a run, unless its file holds the same one already."""
    if read_previous(output) != recipe:
        dump_recipe(recipe, output / RECIPE)


def save_stage(trainer, processor, recipe: Recipe, folder: Path) -> None:
    """Write a stage's model and processor, and how they were made.

    Args:
        trainer: The stage's trainer, on every process.
        processor: The model's processor.
        recipe: The recipe that is running.
        folder: The stage's folder.
    """
    from transformers.utils import logging as hf_logging

    had_bar = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()  # a bar for each shard would break ours
    trainer.save_model(str(folder))
    if had_bar:
        hf_logging.enable_progress_bar()
    if trainer.is_world_process_zero():
        # A pickle of what config.yaml holds as text.
        (folder / "training_args.bin").unlink(missing_ok=True)
        processor.save_pretrained(folder)
        dump_recipe(recipe, folder / RECIPE)
        plan = json.dumps(trainer.model.plan.to_dict(), indent=1)
        write_text_file(folder / "plan.json", plan + "\n")
        versions = json.dumps(_collect_versions(recipe.seed), indent=1)
        write_text_file(folder / FINISHED, versions + "\n")  # last: the marker of the stage
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
        if not path.is_file() or path.name == LOG:
            continue
        link = target / path.relative_to(source)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)
        try:
            os.link(path, link)
        except OSError:
            shutil.copy2(path, link)
