"""Training by a recipe, in three parts that follow one another.

    read_inputs    (reading)    the recipe, its arguments and its records  -> RunInputs
    prepare_run    (preparing)  the model, checked against every stage     -> PreparedRun
    run_stages     (here)       one `StageTrainer` after another           -> RunResult

Everything is checked in the first two, so that a run does not stop hours later for a wrong key.

A run writes to the recipe's output folder:

    config.yaml            the recipe as it ran; loading it repeats the run
    inputs.json            what the run was made from, for resuming
    skipped.txt            records that were left out (on_error: skip), if there are any
    STAGE/                 model and processor after the stage, with config.yaml, plan.json,
                           versions.json and log.jsonl
    STAGE/skipped.txt      records that turned out to be broken while training
    STAGE/checkpoint-N/    only where args ask for it (save_strategy: steps), for resuming
    final/                 the last stage's model again (hard links where the disk has them)

If no stage trains the base of an upgraded model, only the shortcuts are written. They name their
base.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import TrainingArguments

from ..adapters import add_adapters, merge_adapters
from ..building import load
from ..config.folder_lock import lock_folder
from ..config.recipe import Recipe, Stage, load_recipe
from ..config.yaml_io import expand_path
from ..data.collator import Collator
from ..data.dataset import TrainingData
from ..data.encoding import example_encoder
from ..data.examples import Example
from ..data.feature_cache import VisionFeatureCache, build_feature_cache, get_tap_views
from ..data.packing import pack_dataset
from ..data.streaming import Stream
from ..fingerprint import base_hash
from ..schema import UserError, write_text_file
from ..waits import show_step
from .arguments import build_arguments
from .freezing import apply_liger, freeze, trains_base, unfreeze
from .preparing import PreparedRun, PreparedStage, build_encoder, prepare_run
from .progress import StageLog, print_message
from .reading import read_inputs
from .run_card import write_run_card
from .run_dir import (
    FINAL,
    INPUTS,
    SKIPPED,
    find_start,
    is_begun,
    link_files,
    read_previous,
    remove_run,
    save_stage,
    write_recipe,
)
from .run_inputs import write_inputs
from .trainer import LossNotFinite, StageTrainer


@dataclass(frozen=True)
class StageResult:
    """A stage that has run.

    Attributes:
        name: The stage's name.
        folder: Its folder, with the model after the stage.
        num_steps: Optimizer steps, also those before it was resumed.
    """

    name: str
    folder: Path
    num_steps: int


@dataclass(frozen=True)
class RunResult:
    """A run that has ended.

    Attributes:
        model: The trained model, in evaluation mode.
        processor: Its processor.
        folder: The run's output folder; the model is in `final` there.
        stages: Results of the stages that ran, without those that were complete before.
    """

    model: torch.nn.Module
    processor: object
    folder: Path
    stages: list[StageResult]


def train(
    recipe: Recipe | str | Path,
    *,
    check: bool = False,
    resume: bool = False,
    overwrite: bool = False,
    model: Any = None,
    processor: Any = None,
    shown: bool = True,
) -> Any:
    """Train by a recipe.

    Args:
        recipe: The recipe, or its file.
        check: Read and encode all records, open every image, and stop there.
        resume: Continue after the last finished stage or checkpoint of the same recipe.
        overwrite: Replace the run that the output folder holds.
        model: A model to start from instead of building `recipe.model`.
        processor: Its processor.
        shown: Whether to show progress on screen.

    Returns:
        (model, processor), the model in evaluation mode.

    Raises:
        UserError: If something of the recipe or its data cannot be used. What can be known
            beforehand is raised before anything is written.
        TrainingInterrupted: If SIGTERM has ended training, after a checkpoint is written.
    """
    if not isinstance(recipe, Recipe):
        recipe = load_recipe(recipe)
    # From here on, so that what is read of the folder still holds when it is written.
    lock = nullcontext() if check else lock_folder(expand_path(recipe.output))
    with lock:
        inputs = read_inputs(recipe, check=check, resume=resume, overwrite=overwrite)
        prepared = prepare_run(inputs, model, processor, shown=shown)
        if check:
            return prepared.model, prepared.processor
        result = run_stages(prepared, shown=shown)
    return result.model, result.processor


def check_recipe(
    recipe: Recipe,
    *,
    resume: bool = False,
    overwrite: bool = False,
    model: Any = None,
    processor: Any = None,
) -> PreparedRun:
    """Read and encode all records of a recipe and open every image; nothing is written.

    Args:
        recipe: The recipe.
        resume: As for `train`, which may be called next.
        overwrite: As for `train`.
        model: A model to start from instead of building `recipe.model`.
        processor: Its processor.

    Raises:
        UserError: If something of the recipe or its data cannot be used.
    """
    inputs = read_inputs(recipe, check=True, resume=resume, overwrite=overwrite)
    return prepare_run(inputs, model, processor)


def run_stages(prepared: PreparedRun, *, shown: bool = True) -> RunResult:
    """Train the stages that are not complete yet, and write what each gives.

    Args:
        prepared: The model and its stages; the model is changed in place.
        shown: Whether to show progress on screen.

    Returns:
        The trained model, and what ran.

    Raises:
        UserError: If training cannot go on, for example at a loss that is not finite.
        TrainingInterrupted: If SIGTERM has ended training, after a checkpoint is written.
    """
    inputs = prepared.inputs
    with lock_folder(inputs.output):
        PartialState().wait_for_everyone()  # all have looked at the folder before one writes
        if inputs.arguments[0].should_save:
            _begin_run(prepared)
        model, processor, results = _run_unfinished(prepared, shown)
        if inputs.arguments[-1].should_save:
            link_files(Path(inputs.arguments[-1].output_dir), inputs.output / FINAL)
            write_run_card(inputs.output / FINAL, inputs.recipe)
    return RunResult(model, processor, inputs.output, results)


def _begin_run(prepared: PreparedRun) -> None:
    """Remove what the run replaces, and write its recipe and the records that it leaves out."""
    inputs = prepared.inputs
    output = inputs.output
    previous = read_previous(output)
    if previous is not None and not inputs.resume:
        remove_run(output, previous)
    is_continued = inputs.resume and is_begun(inputs.recipe, output)
    write_recipe(inputs.recipe, output)
    if not (is_continued and (output / INPUTS).is_file()):
        write_inputs(output, prepared.facts)
    if prepared.problems:
        lines = "".join(f"{problem}\n" for problem in prepared.problems)
        write_text_file(output / SKIPPED, lines)


def _run_unfinished(prepared: PreparedRun, shown: bool) -> tuple:
    """Train the stages that are not complete: (model, processor, results)."""
    inputs = prepared.inputs
    model = prepared.model
    processor = prepared.processor
    examples = [example for stage in prepared.stages for example in stage.examples]
    examples += inputs.evaluation_examples
    cache = open_feature_cache(inputs.recipe, model, processor, examples, inputs.arguments[0])
    results = []
    for stage in prepared.stages[inputs.num_finished :]:
        # Made anew, because making arguments sets up accelerate for this stage.
        args = build_arguments(stage.stage, inputs.recipe.seed, inputs.output)
        folder = Path(args.output_dir)
        checkpoint = find_start(folder, resume=inputs.resume, main=args.should_save)
        held_out = prepared.held_out if args.eval_strategy != "no" else []
        trainer = train_stage(
            stage,
            model,
            processor,
            args,
            checkpoint=checkpoint,
            cache=cache,
            held_out=held_out,
            shown=shown,
        )
        with show_step(f"saving {folder}"):
            save_stage(trainer, processor, inputs.recipe, folder)
        if trainer.is_sharded:
            # Its weights lie in pieces on several processes; the next stage starts with whole ones.
            model, processor = load(folder)
            _update_base_hash(model)
        results.append(StageResult(stage.stage.name, folder, trainer.state.global_step))
    return model, processor, results


def train_stage(
    prepared: PreparedStage,
    model: Any,
    processor: Any,
    args: TrainingArguments,
    *,
    checkpoint: Path | None = None,
    cache: VisionFeatureCache | None = None,
    held_out: list[Example] | None = None,
    shown: bool = True,
) -> StageTrainer:
    """Train the parts that a stage names.

    Args:
        prepared: The stage with its checked examples.
        model: The model, which is changed in place and left in evaluation mode.
        processor: Its processor.
        args: The stage's arguments, made just before.
        checkpoint: A checkpoint of the stage to continue.
        cache: Vision features of all examples, read instead of running the encoder.
        held_out: Examples for the loss that is logged beside the training loss.
        shown: Whether to show progress on screen.

    Returns:
        The stage's trainer, after training.

    Raises:
        UserError: If training cannot go on; the message starts with the stage's name.
    """
    stage = prepared.stage
    try:
        with show_step(f"training, stage {stage.name}") if shown else nullcontext() as step:
            log = StageLog(stage.name, Path(args.output_dir), shown=shown, step=step)
            _make_trainable(model, stage)
            trainer = _build_trainer(
                prepared, model, processor, args, log, cache=cache, held_out=held_out
            )
            trainer.train_from(checkpoint)
        if stage.lora and stage.lora.merge:
            merge_adapters(model)
        if not trainer.is_sharded:
            _update_base_hash(model)
    except LossNotFinite as error:
        raise LossNotFinite(f"stage {stage.name}: {error}") from error
    except UserError as error:
        raise UserError(f"stage {stage.name}: {error}") from error
    finally:
        unfreeze(model)
        model.eval()
    return trainer


def open_feature_cache(
    recipe: Recipe,
    model: Any,
    processor: Any,
    examples: list[Example],
    args: TrainingArguments | None = None,
) -> VisionFeatureCache | None:
    """Open the recipe's folder of vision features, filled for these examples.

    Args:
        recipe: The recipe; `feature_cache` names the folder.
        model: The model whose encoder makes features that are missing.
        processor: Its processor.
        examples: Examples whose images must be there.
        args: Arguments of a stage, so that among several processes only the first one writes.

    Returns:
        The cache, None where the recipe names no folder.
    """
    if recipe.feature_cache is None:
        return None
    folder = expand_path(recipe.feature_cache)
    first = args.main_process_first(desc="caching vision features") if args else nullcontext()
    with first:
        workers = args.dataloader_num_workers if args else 0
        return build_feature_cache(
            folder, model, processor, examples, workers=workers, log=print_message
        )


def _make_trainable(model: Any, stage: Stage) -> None:
    """Put adapters on the model and freeze all but the stage's parts."""
    add_adapters(model, stage.train, stage.lora)
    freeze(model, stage.train)
    if not model.is_upgrade:
        return
    if "fusion" in stage.train:
        model.fusion.float()  # whatever the base's dtype: in half precision small steps are lost
    if trains_base(stage):
        model.config.base_name = None  # its base is no longer the one of that name


def _build_trainer(
    prepared: PreparedStage,
    model: Any,
    processor: Any,
    args: TrainingArguments,
    log: StageLog,
    *,
    cache: VisionFeatureCache | None,
    held_out: list[Example] | None,
) -> StageTrainer:
    """The trainer of a stage, with its datasets."""
    stage = prepared.stage
    encoder = build_encoder(stage, model, processor)
    tap_views = get_tap_views(model.plan, model.config.vision_depth)
    collator = Collator(
        encoder,
        pad_to=stage.pad_to,
        defer_errors=True,
        count_positions=model.get_position_counter() if model.is_upgrade else None,
    )
    data = TrainingData(prepared.examples, encoder, feature_cache=cache, tap_views=tap_views)
    if prepared.is_stream:
        data = Stream(
            stage.data,
            data,
            seed=args.data_seed,
            batch=args.per_device_train_batch_size,
            rank=args.process_index,
            processes=args.world_size,
        )
    data = pack_dataset(data, model, stage)
    if args.use_liger_kernel:
        apply_liger(model, args.liger_kernel_config)
        # The Trainer would look for kernels of the whole model's type, and find none.
        args.use_liger_kernel = False
    held_out_data = None
    if held_out:
        held_out_data = TrainingData(
            held_out, example_encoder(processor), feature_cache=cache, tap_views=tap_views
        )
    return StageTrainer(
        model=model,
        args=args,
        stage=stage,
        log=log,
        mixture=_get_mixture(prepared),
        train_dataset=data,
        eval_dataset=held_out_data,
        data_collator=collator,
    )


def _get_mixture(prepared: PreparedStage) -> list[tuple[int, float]] | None:
    """Number of examples and weight of every source, None where sources have no weights."""
    if not prepared.stage.data[0].weight:
        return None
    return [(len(entry.examples), entry.source.weight) for entry in prepared.sources]


def _update_base_hash(model: Any) -> None:
    if model.is_upgrade:
        model.config.base_digest = base_hash(model.base)
