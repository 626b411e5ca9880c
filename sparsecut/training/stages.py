"""Training by a recipe: stage after stage, each one Hugging Face Trainer, everything checked before
the first step.

Written to the recipe's output folder:

    config.yaml                 the recipe as it ran; loading it repeats the run skipped.txt
    sentences about records left out (on_error: skip), if there are any STAGE/skipped.txt
    sentences about those that turned out to be broken while training, and were replaced STAGE/
    model and processor after the stage, config.yaml, plan.json, versions.json, log.jsonl
    STAGE/checkpoint-N/         only where args ask for it (save_strategy: steps), for resuming
    inside a stage final/                      the last stage's model again (hard links where the
    disk has them): what `load` takes

Of an upgraded model whose base no stage has trained, only the shortcuts are written, which name their base.
"""

from __future__ import annotations

import logging
from contextlib import nullcontext
from pathlib import Path

import torch
from transformers import TrainingArguments, set_seed

from ..adapters import add_adapters, get_adapted_part, import_peft, merge_adapters
from ..building import build, is_saved, load
from ..config.recipe import Recipe, Source, Stage, dump_recipe, load_recipe
from ..config.yaml_io import expand_path
from ..data.dataset import Collator, Example, TrainingData, check_examples, choose, read_source
from ..data.errors import RecordError
from ..data.feature_cache import VisionFeatureCache, prepare_states, views_of
from ..data.packing import in_rows
from ..data.streaming import Stream, first_of
from ..fingerprint import base_hash
from ..methods import make_plan
from ..modeling_base import is_sparsecut_model
from ..prompts import get_max_length
from ..schema import UserError
from ..upgrading import upgrade
from .arguments import stage_arguments
from .freezing import apply_liger, check_parts, freeze
from .progress import StageLog, report
from .run_dir import SKIPPED, check_output, clear_stage, finished, link_all, save_stage
from .trainer import StageTrainer

HALVES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}  # by the argument that asks for computing in it
HELD_OUT = 256  # records at most that are looked at while training
logger = logging.getLogger(__name__)


def train(
    recipe: Recipe | str | Path,
    *,
    check: bool = False,
    resume: bool = False,
    model=None,
    processor=None,
    shown: bool = True,
):
    """Train by a recipe (or its file) and return (model, processor), in evaluation mode.

    check: read and encode all records, open every picture, and stop there. resume: go on after the
    last finished stage or checkpoint of the same recipe. model, processor: start from these instead
    of building `recipe.model`. shown: progress on screen. Raises ValueError, before anything is
    written, for whatever of the recipe or its data cannot be used.
    """
    recipe = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    output = Path(expand_path(recipe.output))
    arguments = [stage_arguments(stage, recipe.seed, output) for stage in recipe.stages]
    check_output(recipe, output, resume=resume or check)
    problems: list[RecordError] = []
    read = [
        [
            (source, None if source.streaming else read_source(source, problems))
            for source in stage.data
        ]
        for stage in recipe.stages
    ]
    asked = [
        e
        for source in (recipe.evaluate.data if recipe.evaluate else ())
        for e in read_source(source, problems)
    ]
    for example in asked if check else ():
        example.pictures()

    done = finished(recipe, output) if resume and not check else 0
    if done:
        model, processor = load(output / recipe.stages[done - 1].name)
    else:
        model, processor = _start(recipe, arguments, model, processor)
    _check_plan(recipe, model)
    _check_states(recipe, model)
    for stage in recipe.stages:
        check_parts(model, stage.train)
        if stage.lora is not None:
            import_peft()
    skips = any(source.on_error == "skip" for stage in recipe.stages for source in stage.data)
    opened = check or (
        skips and recipe.states is not None
    )  # states are kept of every good picture before training
    data = [
        _checked(
            stage,
            sources,
            processor,
            limits=_limits(stage, model),
            open_pictures=opened,
            problems=problems,
        )
        for stage, sources in zip(recipe.stages, read, strict=True)
    ]
    for stage, found in zip(recipe.stages, data, strict=True):
        _check_batches(stage, found, model, processor)
    held_out = _held_out(arguments, asked, processor)
    _report(recipe, data, problems, shown=shown and arguments[0].should_log)
    if check:
        return model, processor

    if arguments[0].should_save:
        output.mkdir(parents=True, exist_ok=True)
        dump_recipe(recipe, output / "config.yaml")
        if problems:
            (output / SKIPPED).write_text("".join(f"{error}\n" for error in problems))
    kept = [e for found in data for _, examples in found for e in examples] + asked
    states = kept_states(recipe, model, processor, kept, arguments[0])
    for stage, found in list(zip(recipe.stages, data, strict=True))[done:]:
        args = stage_arguments(
            stage, recipe.seed, output
        )  # anew: making them sets accelerate up for this stage
        folder = Path(args.output_dir)
        checkpoint = clear_stage(folder, resume=resume, main=args.should_save)
        more = {"states": states, "held_out": held_out if args.eval_strategy != "no" else None}
        trainer = train_stage(
            model, processor, stage, found, args, checkpoint=checkpoint, shown=shown, **more
        )
        save_stage(trainer, processor, recipe, folder)
        if (
            trainer.is_sharded
        ):  # its weights lie in pieces on several processes; the next stage begins with whole ones
            model, processor = load(folder)
            if model.is_upgrade:
                model.config.base_digest = base_hash(model.base)
    if arguments[-1].should_save:
        link_all(Path(arguments[-1].output_dir), output / "final")
    return model, processor


def train_stage(
    model,
    processor,
    stage: Stage,
    found: list[tuple[Source, list[Example]]],
    args: TrainingArguments,
    *,
    checkpoint=None,
    shown: bool = True,
    states: VisionFeatureCache | None = None,
    held_out: list[Example] | None = None,
) -> StageTrainer:
    """Train the parts that a stage names on checked examples; the model is changed in place and
    left in evaluation mode.

    found: the stage's sources with their examples; of streams these are the first, and the rest is
    read while training goes on.
    states: kept states of all the examples' pictures, read instead of running the encoder.
    held_out: what the loss is told of while training (args.eval_strategy).
    """
    add_adapters(model, stage.train, stage.lora)
    freeze(model, stage.train)
    if "fusion" in stage.train and model.is_upgrade:
        model.fusion.float()  # whatever its base is in: steps are lost in half precision
    if changes_base(stage) and model.is_upgrade:
        model.config.base_name = None  # its base is no longer the one of that name
    views = views_of(model.plan, model.config.vision_depth)
    log = StageLog(stage.name, Path(args.output_dir), shown=shown)
    settings = {"template": stage.template, "max_length": stage.max_length}
    limits = _limits(stage, model)
    collator = Collator(processor, **settings, **limits, pad_to=stage.pad_to, defer_errors=True)
    examples = [example for _, of_source in found for example in of_source]
    data = TrainingData(examples, processor, **settings, states=states, views=views)
    mixture = (
        [(len(of_source), source.weight) for source, of_source in found]
        if stage.data[0].weight
        else None
    )
    try:
        if stage.data[0].streaming:
            share = {
                "batch": args.per_device_train_batch_size,
                "rank": args.process_index,
                "processes": args.world_size,
            }
            data = Stream(stage.data, data, {**settings, **limits}, seed=args.data_seed, **share)
        data = in_rows(data, model, stage)
        if args.use_liger_kernel:
            apply_liger(model, args.liger_kernel_config)
            args.use_liger_kernel = (
                False  # the Trainer would look for kernels of the whole model's type, and find none
            )
        asked = TrainingData(held_out, processor, states=states, views=views) if held_out else None
        sets = {"train_dataset": data, "eval_dataset": asked, "data_collator": collator}
        trainer = StageTrainer(
            model=model, args=args, stage=stage, log=log, mixture=mixture, **sets
        )
        trainer.train_from(checkpoint)
        if stage.lora and stage.lora.merge:
            merge_adapters(model)
        if model.is_upgrade and not trainer.is_sharded:
            model.config.base_digest = base_hash(model.base)
    except UserError as error:
        if str(error).startswith("stage "):
            raise
        raise UserError(f"stage {stage.name}: {error}") from error
    finally:
        log.close()
        for parameter in model.parameters():  # those of a quantised base are whole numbers
            parameter.requires_grad_(parameter.is_floating_point())
        model.eval()
    return trainer


def changes_base(stage: Stage) -> bool:
    """Whether a stage changes weights of an upgraded model's base; an adapter that is kept beside
    it does not.
    """
    beside = stage.lora is not None and not stage.lora.merge
    return any(
        not (name == "fusion" or (beside and get_adapted_part(name))) for name in stage.train
    )


def kept_states(
    recipe: Recipe, model, processor, examples: list[Example], args=None
) -> VisionFeatureCache | None:
    """The recipe's folder of encoder states, filled for these examples; None where it names
    none.
    """
    if recipe.states is None:
        return None
    with args.main_process_first(desc="keeping states of the encoder") if args else nullcontext():
        return prepare_states(expand_path(recipe.states), model, processor, examples, log=report)


def _start(recipe: Recipe, arguments: list[TrainingArguments], model, processor):
    """The model that training starts with: the one given, upgraded if it is a finished
    vision-language model, or the recipe's.
    """
    set_seed(recipe.seed)  # fusion starts from random weights
    if model is not None:
        return (
            (model, processor)
            if is_sparsecut_model(model)
            else upgrade(model, recipe.fusion, processor=processor)
        )
    if recipe.model.base is None:
        parts = expand_path(recipe.model.vision), expand_path(recipe.model.language)
        return build(*parts, recipe.fusion, view_size=recipe.model.view_size)
    base = expand_path(recipe.model.base)
    if is_saved(base):
        return load(base)
    # A base that stays frozen takes the room of the precision it computes in; one that is trained
    # too needs single precision.
    frozen = not any(changes_base(stage) for stage in recipe.stages)
    half = next(
        (dtype for name, dtype in HALVES.items() if all(getattr(args, name) for args in arguments)),
        None,
    )
    return upgrade(base, recipe.fusion, dtype=half if half and frozen else torch.float32)


def _check_plan(recipe: Recipe, model) -> None:
    if recipe.fusion is None:
        return
    plan = make_plan(recipe.fusion, model.config.vision_depth, model.config.language_depth)
    if model.is_upgrade and not plan.has_base_input:
        plan = plan.for_upgrade(fine=model.family.has_one_view(model.base))
    if plan != model.plan:
        raise UserError(
            f"the recipe's fusion gives the plan {plan}, but the model given has {model.plan}; make"
            " them the same, or leave fusion out"
        )


def _check_states(recipe: Recipe, model) -> None:
    if recipe.states is not None and not model.supports_feature_cache:
        raise UserError(
            f"states is {recipe.states!r}, but states cannot be kept of an upgraded model, whose"
            " base runs its encoder in its own way; remove `states`"
        )


def _check_batches(stage: Stage, found: list, model, processor) -> None:
    """Raise ValueError, before any stage is trained, where this one's batches cannot be made as it
    says.
    """
    if stage.pad_to is not None and model.is_upgrade:
        raise UserError(
            f"pad_to is {stage.pad_to}, but an upgraded model's own processor pads its batches;"
            " remove pad_to"
        )
    if stage.pack is not None:
        examples = [example for _, of_source in found for example in of_source]
        in_rows(
            TrainingData(examples, processor, template=stage.template, max_length=stage.max_length),
            model,
            stage,
        )


def _limits(stage: Stage, model) -> dict:
    return {"limit": get_max_length(model), "max_images": stage.max_image_tokens}


def _checked(
    stage: Stage,
    sources,
    processor,
    *,
    limits: dict,
    open_pictures: bool,
    problems: list[RecordError],
) -> list:
    """Every source of a stage with its good examples, of a stream the first ones."""
    settings = {"template": stage.template, "max_length": stage.max_length, **limits}
    good = []
    for source, found in sources:
        if source.streaming:
            good.append((source, first_of(source, processor, settings)))
            continue
        notes = problems if source.on_error == "skip" else None
        good.append(
            (
                source,
                check_examples(
                    found, processor, **settings, open_pictures=open_pictures, problems=notes
                ),
            )
        )
    if not all(examples for _, examples in good):
        raise UserError(
            f"stage {stage.name}: a source has no record left to learn from; {len(problems)} were"
            f" skipped, the last: {problems[-1] if problems else None}"
        )
    return good


def _held_out(arguments: list[TrainingArguments], asked: list[Example], processor) -> list[Example]:
    """A fixed choice of what the recipe evaluates on, for stages that look at it while they
    train.
    """
    wanted = [args.output_dir for args in arguments if args.eval_strategy != "no"]
    if wanted and not asked:
        raise UserError(
            f"stage {Path(wanted[0]).name}: args.eval_strategy asks for a look at held-out data"
            " while training, but the recipe has no `evaluate`; add one with its data, or remove"
            " args.eval_strategy"
        )
    return check_examples(choose(asked, keep=HELD_OUT), processor) if wanted else []


def _report(recipe: Recipe, data: list, problems: list[RecordError], *, shown: bool) -> None:
    if problems:
        logger.warning("%d records are skipped, the first: %s", len(problems), problems[0])
    for stage, found in zip(recipe.stages, data, strict=True) if shown else ():
        examples = [example for _, of_source in found for example in of_source]
        pictures = sum(len(example.images) for example in examples)
        size = f"{len(examples):,} records with {pictures:,} pictures"
        if stage.data[0].streaming:
            size = f"a stream of {len(found)} sources"
        report(f"{stage.name}: {size}, training {', '.join(stage.train)}")
