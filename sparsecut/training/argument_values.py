"""Types and values of `TrainingArguments`, which checks few of them itself.

A wrong one would otherwise end a run after its model is loaded, or be read as something else: a
whole number for a path is an open file to Python, and the text "false" is true.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields
from enum import Enum
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import torch
from transformers import Trainer, TrainingArguments
from transformers.optimization import get_scheduler

from ..schema import TYPE_NAMES, UserError, check_choice, is_whole_number, show_value, suggest_value

# Types beyond those that transformers annotates.
MORE_TYPES = {"fsdp": bool | list[str]}
# Least and greatest values; None is no limit.
LIMITS = {
    "learning_rate": (0, None),
    "weight_decay": (0, None),
    "adam_beta1": (0, 1),
    "adam_beta2": (0, 1),
    "adam_epsilon": (0, None),
    "max_grad_norm": (0, None),
    "neftune_noise_alpha": (0, None),
    "max_steps": (-1, None),
    "num_train_epochs": (0, None),
    "warmup_steps": (0, None),
    "logging_steps": (0, None),
    "eval_steps": (0, None),
    "eval_delay": (0, None),
    "save_steps": (0, None),
    "data_seed": (0, 2**63 - 1),
    "per_device_eval_batch_size": (1, None),
    "eval_accumulation_steps": (1, None),
    "dataloader_num_workers": (0, None),
    "dataloader_prefetch_factor": (1, None),
    "ddp_bucket_cap_mb": (1, None),
    "ddp_timeout": (1, 10**9),
}
# What an evaluation on the way measures: `metric_for_best_model` names one of them.
METRICS = ("loss", "runtime", "samples_per_second", "steps_per_second")
STEPS = 1_000_000  # of a schedule that is made for a trial


def check_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """Check types and sizes of arguments.

    Args:
        values: Keyword arguments of `TrainingArguments`, as YAML holds them. All names are known.

    Returns:
        The same. Numbers such as 1e3 are whole where whole ones are needed.

    Raises:
        UserError: A value has another type, lies outside its limits, or cannot be obeyed.
    """
    checked = {}
    hints = get_type_hints(TrainingArguments)
    choices = {field.name: field.metadata.get("choices") for field in fields(TrainingArguments)}
    for name, value in values.items():
        key = f"args.{name}"
        types = _list_types(hints[name]) + _list_types(MORE_TYPES.get(name, ()))
        if int in types and float not in types and isinstance(value, float) and value % 1 == 0:
            value = int(value)
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{key} is {value}, but must be a finite number")
        if not any(_is_of(value, hint) for hint in types):
            _refuse_type(key, value, types)
        if choices[name] and value is not None:
            check_choice(key, value, tuple(choices[name]))
        _check_limits(key, value, *LIMITS.get(name, (None, None)))
        checked[name] = value
    if values.get("resume_from_checkpoint"):
        raise UserError(
            "args.resume_from_checkpoint is set, but a run is continued from its own output folder;"
            " remove it, and add --resume (resume=True in Python)"
        )
    if values.get("max_steps") == 0:
        raise UserError(
            "args.max_steps is 0, which means -1: as many as num_train_epochs gives; write -1, or"
            " at least 1"
        )
    return checked


def _list_types(hint) -> list:
    """The members of a union, or the annotation alone."""
    if hint == ():
        return []
    return list(get_args(hint)) if get_origin(hint) in (Union, UnionType) else [hint]


def _is_of(value: Any, hint) -> bool:
    """Whether a value of YAML is what an annotation says; names of an enumeration are text."""
    kind = get_origin(hint) or hint
    if kind is Any:
        return True
    if kind is Literal:
        return any(value is item for item in get_args(hint))
    if kind is int:
        return is_whole_number(value)
    if kind is float:
        return is_whole_number(value) or isinstance(value, float)
    if issubclass(kind, Enum):
        return isinstance(value, str | kind)
    if not isinstance(value, kind):
        return False
    parts = get_args(hint)
    if kind is list and parts:
        return all(_is_of(item, parts[0]) for item in value)
    if kind is dict and parts:
        return all(isinstance(key, str) and _is_of(value[key], parts[1]) for key in value)
    return True


def _refuse_type(key: str, value: Any, types: list) -> None:
    allowed = " or ".join(dict.fromkeys(_name_type(hint) for hint in types))
    remedy = suggest_value(key, value, types)
    if not remedy and str in types and not isinstance(value, list | dict):
        remedy = "; write text in quotes"
    raise UserError(f"{key} is {show_value(value)}, but must be {allowed}{remedy}")


def _name_type(hint) -> str:
    kind = get_origin(hint) or hint
    if kind is Literal:
        return " or ".join(repr(item) for item in get_args(hint))
    if kind is list:
        return "a list"
    if issubclass(kind, Enum):
        return f"one of {', '.join(item.value for item in kind)}"
    return TYPE_NAMES.get(kind, f"a {kind.__name__} (in Python)")


def _check_limits(key: str, value: Any, least: float | None, most: float | None) -> None:
    if least is None or isinstance(value, str | NoneType):
        return
    if value < least or (most is not None and value > most):
        limits = f"at least {least}" if most is None else f"from {least} to {most}"
        raise UserError(f"{key} is {value!r}, but must be {limits}")


def check_evaluation(args: TrainingArguments) -> None:
    """Check what arguments make of evaluations on the way.

    Raises:
        UserError: They name a metric that is not measured, or want one and evaluate nothing.
    """
    needing = {
        "load_best_model_at_end": args.load_best_model_at_end,
        "eval_on_start": args.eval_on_start,
        "save_strategy: best": args.save_strategy == "best",
    }
    for name, is_set in needing.items():
        if is_set and args.eval_strategy == "no":
            raise UserError(
                f"args has {name}, but args.eval_strategy is 'no', so nothing is evaluated on the"
                " way; set eval_strategy: steps and eval_steps, or remove it"
            )
    metric = args.metric_for_best_model
    if metric is None:
        if args.save_strategy == "best":
            raise UserError(
                "args.save_strategy is 'best', but args.metric_for_best_model does not say by what;"
                " set it to loss"
            )
        return
    check_choice("args.metric_for_best_model", metric.removeprefix("eval_"), METRICS)
    if metric.removeprefix("eval_") == "loss" and args.greater_is_better:
        raise UserError(
            "args.greater_is_better is true, but the best model has the smallest loss; remove it"
        )


def try_optimizer(args: TrainingArguments) -> None:
    """Make the optimizer and the schedule for a single weight.

    Raises:
        UserError: Their arguments cannot be used, or their package is not installed.
    """
    given = f"args.optim is {args.optim.value}, args.optim_args is {args.optim_args!r}"
    for part in (args.optim_args or "").split(",") if args.optim_args else ():
        if len(part.split("=")) != 2:
            raise UserError(
                f"args.optim_args is {args.optim_args!r}, but must be names and values such as"
                " momentum=0.9,nesterov=true"
            )
    weight = torch.nn.Parameter(torch.zeros(1))
    try:
        kind, settings = Trainer.get_optimizer_cls_and_kwargs(args)
        if isinstance(kind, type) and kind.__module__.startswith(("torch.optim", "transformers.")):
            settings.pop("fused", None)  # not on every device
            kind([weight], **settings)
    except ImportError as error:
        raise UserError(f"args.optim is {args.optim.value}: {error}") from error
    except (ValueError, TypeError, AttributeError, ArithmeticError) as error:
        if args.optim_target_modules is None and "model" not in str(error):
            raise UserError(f"{given}, which cannot be used: {error}") from error
    # Others need the model, so the Trainer checks them.
    _try_schedule(args, weight)


def _try_schedule(args: TrainingArguments, weight: torch.nn.Parameter) -> None:
    optimizer = torch.optim.SGD([weight], lr=args.learning_rate)
    try:
        schedule = get_scheduler(
            args.lr_scheduler_type,
            optimizer,
            num_warmup_steps=args.get_warmup_steps(STEPS),
            num_training_steps=STEPS,
            scheduler_specific_kwargs=dict(args.lr_scheduler_kwargs or {}),
        )
        if args.lr_scheduler_type not in ("reduce_lr_on_plateau", "greedy"):
            optimizer.step()
            schedule.step()
    except (ValueError, TypeError, AttributeError, ArithmeticError, AssertionError) as error:
        raise UserError(
            f"args.lr_scheduler_type is {args.lr_scheduler_type.value} with lr_scheduler_kwargs"
            f" {args.lr_scheduler_kwargs!r}, which cannot be used: {error}"
        ) from error
