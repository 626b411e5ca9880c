"""`TrainingArguments` from a stage: nothing renamed, everything checked, and what cannot work with
a stage refused.
"""

from __future__ import annotations

import importlib.util
import os
from dataclasses import fields
from pathlib import Path

import torch
from transformers import TrainingArguments

from ..config.recipe import Stage
from ..schema import UserError, nearest

OWN_ARGS = {"output_dir": "the recipe's `output`", "seed": "the recipe's `seed`"}


def stage_arguments(stage: Stage, seed: int, output: Path) -> TrainingArguments:
    """`TrainingArguments(**stage.args)` with what a stage needs besides; ValueError names an
    argument that cannot be taken.

    Other than in transformers, nothing is reported anywhere, no checkpoint is written and every
    tenth step is logged unless args say otherwise.
    """
    known = {f.name: f for f in fields(TrainingArguments) if f.init}
    for key, value in stage.args.items():
        if key not in known:
            raise UserError(
                f"stage {stage.name}: args.{key} is no argument of transformers'"
                f" TrainingArguments{nearest(key, known)}"
            )
        if key in OWN_ARGS:
            raise UserError(
                f"stage {stage.name}: args.{key} is set by {OWN_ARGS[key]}; set that instead"
            )
        if (
            isinstance(known[key].default, int | float)
            and isinstance(value, str)
            and "str" not in str(known[key].type)
        ):
            raise UserError(
                f"stage {stage.name}: args.{key} is the text {value!r}, but must be a number; write"
                " it without quotes"
            )
    if stage.args.get("remove_unused_columns"):
        raise UserError(
            f"stage {stage.name}: args.remove_unused_columns must stay false, or pictures would be"
            " dropped; remove it"
        )
    if stage.args.get("use_liger_kernel") and not importlib.util.find_spec("liger_kernel"):
        raise UserError(
            f"stage {stage.name}: args.use_liger_kernel is set, but liger-kernel is not installed;"
            " install it, or remove the argument"
        )
    if stage.args.get("label_smoothing_factor"):
        raise UserError(
            f"stage {stage.name}: args.label_smoothing_factor cannot be used: transformers would"
            " smooth wrong positions; remove it"
        )
    defaults = {
        "data_seed": seed,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 10,
        "use_cpu": (
            not torch.accelerator.is_available()
        ),  # without it processes on CPUs would not know of one another
        "dataloader_pin_memory": torch.cuda.is_available(),
    }
    ours = {
        "remove_unused_columns": False,
        "logging_nan_inf_filter": False,
    }  # the stage's trainer stops at such a loss
    ours["gradient_accumulation_steps"] = accumulation(
        stage, int(os.environ.get("WORLD_SIZE", "1"))
    )
    try:
        args = TrainingArguments(
            output_dir=str(output / stage.name), seed=seed, **{**defaults, **stage.args, **ours}
        )
    except (ValueError, TypeError, ImportError) as error:
        raise UserError(
            f"stage {stage.name}: transformers' TrainingArguments refuses args: {error}"
        ) from None
    if args.world_size != (started := int(os.environ.get("WORLD_SIZE", "1"))):
        raise UserError(
            f"{started} processes were started, but each would train by itself as one of"
            f" {args.world_size}; start them with torchrun or accelerate launch, and leave"
            " args.use_cpu out"
        )
    if args.n_gpu > 1:
        raise UserError(
            f"{args.n_gpu} GPUs are visible to one process, which would split pictures from their"
            f" texts; start one process per GPU (torchrun --nproc-per-node {args.n_gpu} -m"
            " sparsecut train ...) or show it one (CUDA_VISIBLE_DEVICES=0)"
        )
    return args


def accumulation(stage: Stage, processes: int) -> int:
    """Micro-batches that a step of a stage adds up: as args say, or as many as make its global
    batch.

    Raises ValueError with the arithmetic where they cannot, and for a size that is no number of
    records.
    """
    size, given = (
        stage.args.get("per_device_train_batch_size", 8),
        stage.args.get("gradient_accumulation_steps"),
    )
    for name, value in (
        ("per_device_train_batch_size", size),
        ("gradient_accumulation_steps", given),
    ):
        if value is not None and (not isinstance(value, int) or value < 1):
            raise UserError(
                f"stage {stage.name}: args.{name} is {value!r}, but must be a whole number of at"
                " least 1"
            )
    if stage.global_batch is None:
        return 1 if given is None else given
    if stage.args.get("auto_find_batch_size"):
        raise UserError(
            f"stage {stage.name}: global_batch is {stage.global_batch}, but"
            " args.auto_find_batch_size makes batches smaller where memory is short, and the"
            " global one with them; remove one of them"
        )
    many, left = divmod(stage.global_batch, size * processes)
    if given is None and many and not left:
        return many
    if given is None or given * size * processes != stage.global_batch:
        told = (
            f"per_device_train_batch_size {size} x {processes}"
            f" {'process' if processes == 1 else 'processes'}"
        )
        told += (
            ""
            if given is None
            else f" x gradient_accumulation_steps {given} = {size * processes * given}"
        )
        remedy = (
            "choose a divisor of it"
            if given is None
            else "leave gradient_accumulation_steps out, or correct one of them"
        )
        raise UserError(
            f"stage {stage.name}: global_batch is {stage.global_batch}, which {told} does not give;"
            f" {remedy}"
        )
    return given
