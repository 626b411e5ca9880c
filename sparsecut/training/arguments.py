"""`TrainingArguments` of a stage: transformers' own names, checked before anything else runs."""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Collection, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.integrations import get_available_reporting_integrations

from ..config.recipe import Stage
from ..config.shipped import find_deepspeed
from ..hooks import name_checkpointing
from ..schema import UserError, nearest
from .argument_values import check_evaluation, check_values, try_optimizer

# Arguments that the recipe sets itself, with the recipe's key for each.
RECIPE_KEYS = {"output_dir": "output", "seed": "seed"}
DEFAULT_BATCH_SIZE = 8  # transformers' default of per_device_train_batch_size
# What TrainingArguments, which checks few of its values, raises at wrong ones.
ARGUMENT_ERRORS = (
    ArithmeticError,
    ValueError,
    TypeError,
    KeyError,
    AttributeError,
    AssertionError,
    RuntimeError,
    ImportError,
    OSError,
)


def build_arguments(stage: Stage, seed: int, output: Path) -> TrainingArguments:
    """Build the arguments of a stage's Trainer.

    Three defaults differ from transformers': nothing is reported anywhere, no checkpoint is
    written, and every tenth step is logged.

    Args:
        stage: The stage; its `args` are keyword arguments of `TrainingArguments`.
        seed: The recipe's seed, for the model and for the order of the data.
        output: The recipe's output folder; the stage writes into a folder of its name there.

    Returns:
        The arguments. Making them also sets up accelerate for this stage.

    Raises:
        UserError: If an argument is unknown, has a wrong type, or cannot work with a stage, or if
            the number of processes or GPUs does not fit.
    """
    stage_values = check_arguments(stage)
    _check_unsupported(stage)
    defaults = {
        "data_seed": seed,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 10,
        # Without it, processes on CPUs would not know of one another.
        "use_cpu": not torch.accelerator.is_available(),
        "dataloader_pin_memory": torch.cuda.is_available(),
    }
    num_processes = int(os.environ.get("WORLD_SIZE", "1"))
    fixed = {
        "remove_unused_columns": False,
        "logging_nan_inf_filter": False,  # the stage's trainer stops at such a loss
        "gradient_accumulation_steps": compute_accumulation_steps(stage, num_processes),
    }
    values = {**defaults, **stage_values, **fixed}
    try:
        args = TrainingArguments(output_dir=str(output / stage.name), seed=seed, **values)
    except ARGUMENT_ERRORS as error:
        raise UserError(
            f"stage {stage.name}: transformers' TrainingArguments refuses args: {error}"
        ) from None
    with _name_stage(stage):
        check_evaluation(args)
        _check_reports(args)
        try_optimizer(args)
    _check_processes(args, num_processes)
    return args


def check_arguments(stage: Stage) -> dict[str, Any]:
    """Check names and values of a stage's arguments, whatever machine will train.

    Returns:
        The arguments under the names of this release of transformers.

    Raises:
        UserError: One is unknown, or has another type or size.
    """
    _check_names(stage)
    with _name_stage(stage):
        values = check_values(name_checkpointing(stage.args))
        if isinstance(values.get("deepspeed"), str):
            values["deepspeed"] = str(find_deepspeed(values["deepspeed"]))
        return values


@contextlib.contextmanager
def _name_stage(stage: Stage) -> Iterator[None]:
    try:
        yield
    except UserError as error:
        raise UserError(f"stage {stage.name}: {error}") from error


def _check_reports(args: TrainingArguments) -> None:
    """Refuse a report whose package is not installed here."""
    available = get_available_reporting_integrations()
    for name in args.report_to:
        if name not in available:
            raise UserError(
                f"args.report_to names {name!r}, which is not known or not installed here;"
                f" available are {', '.join(['none', *available])}"
            )


def compute_accumulation_steps(stage: Stage, num_processes: int) -> int:
    """Compute how many micro-batches one step of a stage accumulates.

    Args:
        stage: The stage; `global_batch` is the number of records a step over all processes.
        num_processes: Number of processes that train together.

    Returns:
        `args.gradient_accumulation_steps`, or the number that reaches `global_batch`.

    Raises:
        UserError: If a size is not a whole number of at least 1, or if `global_batch` cannot be
            reached; the message shows the arithmetic.
    """
    batch_size = stage.args.get("per_device_train_batch_size", DEFAULT_BATCH_SIZE)
    steps = stage.args.get("gradient_accumulation_steps")
    _check_positive(stage, "per_device_train_batch_size", batch_size)
    if steps is not None:
        _check_positive(stage, "gradient_accumulation_steps", steps)
    if stage.global_batch is None:
        return 1 if steps is None else steps
    if stage.args.get("auto_find_batch_size"):
        raise UserError(
            f"stage {stage.name}: global_batch is {stage.global_batch}, but"
            " args.auto_find_batch_size makes batches smaller where memory is short, and would"
            " change the global batch; remove one of them"
        )
    records = batch_size * num_processes
    if steps is None:
        quotient, remainder = divmod(stage.global_batch, records)
        if quotient and not remainder:
            return quotient
    elif steps * records == stage.global_batch:
        return steps
    processes = "1 process" if num_processes == 1 else f"{num_processes} processes"
    arithmetic = f"per_device_train_batch_size {batch_size} x {processes}"
    if steps is None:
        remedy = "choose a divisor of global_batch"
    else:
        arithmetic += f" x gradient_accumulation_steps {steps} = {steps * records}"
        remedy = "leave gradient_accumulation_steps out, or correct one of them"
    raise UserError(
        f"stage {stage.name}: global_batch is {stage.global_batch}, but {arithmetic} does not give"
        f" it; {remedy}"
    )


def _check_positive(stage: Stage, name: str, value) -> None:
    if not isinstance(value, int) or value < 1:
        raise UserError(
            f"stage {stage.name}: args.{name} is {value!r}, but must be a whole number of at least"
            " 1"
        )


def _check_names(stage: Stage) -> None:
    known = [field.name for field in fields(TrainingArguments) if field.init]
    for name in name_checkpointing(stage.args):
        _check_name(stage, name, known)


def _check_name(stage: Stage, name: str, known: Collection[str]) -> None:
    if name not in known:
        raise UserError(
            f"stage {stage.name}: args.{name} is not an argument of transformers'"
            f" TrainingArguments{nearest(name, known)}"
        )
    if name in RECIPE_KEYS:
        raise UserError(
            f"stage {stage.name}: args.{name} is set by the recipe's `{RECIPE_KEYS[name]}`; set"
            " that instead"
        )


def _check_unsupported(stage: Stage) -> None:
    """Raise UserError for arguments of transformers that cannot work with a stage."""
    if stage.args.get("remove_unused_columns"):
        raise UserError(
            f"stage {stage.name}: args.remove_unused_columns must stay false, or images would be"
            " dropped; remove it"
        )
    if stage.args.get("use_liger_kernel") and not importlib.util.find_spec("liger_kernel"):
        raise UserError(
            f"stage {stage.name}: args.use_liger_kernel is set, but liger-kernel is not installed;"
            " install it, or remove the argument"
        )
    if stage.args.get("label_smoothing_factor"):
        raise UserError(
            f"stage {stage.name}: args.label_smoothing_factor cannot be used, because transformers"
            " would smooth the wrong positions; remove it"
        )


def _check_processes(args: TrainingArguments, num_processes: int) -> None:
    """Raise UserError unless accelerate sees all processes, and each of them one GPU."""
    if args.world_size != num_processes:
        raise UserError(
            f"{num_processes} processes were started, but each would train by itself as one of"
            f" {args.world_size}; start them with torchrun or accelerate launch, and leave"
            " args.use_cpu out"
        )
    if args.n_gpu > 1:
        raise UserError(
            f"{args.n_gpu} GPUs are visible to one process, which would split images from their"
            f" texts; start one process per GPU (torchrun --nproc-per-node {args.n_gpu} -m"
            " sparsecut train ...), or show it one (CUDA_VISIBLE_DEVICES=0)"
        )
