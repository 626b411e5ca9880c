"""Second part of a run: build the model, and check that every stage can train it.

After this nothing of the recipe or its data should stop the run. Nothing is written here.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import TrainingArguments, set_seed

from ..adapters import check_targets
from ..building import build, is_saved, load
from ..chat_templates.arguments import set_arguments
from ..config.recipe import Recipe, Source, Stage
from ..config.yaml_io import expand_path
from ..data.dataset import TrainingData
from ..data.encoding import ExampleEncoder, example_encoder
from ..data.errors import RecordError
from ..data.examples import Example, select_examples
from ..data.length_limits import Limits
from ..data.packing import pack_dataset
from ..data.streaming import read_first_examples
from ..data.unknown_records import UnknownCount
from ..data.validation import check_examples
from ..methods import make_plan
from ..modeling_base import is_sparsecut_model
from ..prompts import get_max_length
from ..replanning import replan
from ..schema import UserError
from ..upgrading import upgrade
from ..waits import show_step
from .freezing import check_parts, trains_base
from .progress import print_message
from .reading import RunInputs, SourceExamples
from .run_dir import is_begun
from .run_inputs import (
    check_unchanged,
    describe_examples,
    describe_model,
    describe_sources,
    describe_weights,
)

HALF_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}  # by the argument that selects each
MAX_HELD_OUT = 256  # examples that a stage is evaluated on while it trains
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PreparedStage:
    """A stage that can be trained.

    Attributes:
        stage: The stage, as the recipe has it.
        sources: Its sources with checked examples; of streams, the first ones.
    """

    stage: Stage
    sources: list[SourceExamples]

    @property
    def examples(self) -> list[Example]:
        """Examples of all sources, in the recipe's order."""
        return [example for source in self.sources for example in source.examples]

    @property
    def is_stream(self) -> bool:
        """Whether records are read while training goes on; a stage has only streams, or none."""
        return self.stage.data[0].streaming


@dataclass(frozen=True)
class PreparedRun:
    """A model, and the stages that will train it.

    Attributes:
        inputs: What was read.
        model: The model that training starts with.
        processor: Its processor.
        stages: All stages of the recipe, also those that are complete on disk.
        held_out: Examples for stages that are evaluated while they train.
        problems: Records that were left out, those of reading included.
        facts: What the run is made from (`run_inputs`), on the process that writes.
    """

    inputs: RunInputs
    model: torch.nn.Module
    processor: object
    stages: list[PreparedStage]
    held_out: list[Example]
    problems: list[RecordError]
    facts: dict


def prepare_run(
    inputs: RunInputs, model=None, processor=None, *, shown: bool = True
) -> PreparedRun:
    """Build the model and check every record against every stage.

    Args:
        inputs: What was read.
        model: A model to start from instead of the recipe's: one of ours, or a pretrained VLM.
        processor: Its processor.
        shown: Whether to print the size of every stage.

    Returns:
        The model and its stages.

    Raises:
        UserError: If the model cannot be built, or if a stage cannot train it on its records.
    """
    recipe = inputs.recipe
    model, processor = _load_start(inputs, model, processor)
    set_arguments(processor, recipe.chat_template_kwargs)
    _check_model(recipe, model)
    with show_step("noting what the run is made from"):
        facts = _describe_inputs(inputs, model, processor)
    # Features are cached for every good image before training, so bad ones must be known by then.
    skips = any(source.on_error == "skip" for stage in recipe.stages for source in stage.data)
    open_images = inputs.check or (skips and recipe.feature_cache is not None)
    problems = list(inputs.problems)
    stages = []
    for stage, sources in zip(recipe.stages, inputs.sources, strict=True):
        checked = _check_sources(
            stage, sources, model, processor, open_images=open_images, problems=problems
        )
        stages.append(PreparedStage(stage, checked))
    for prepared in stages:
        _check_batches(prepared, model, processor)
    held_out = _choose_held_out(inputs.arguments, inputs.evaluation_examples, processor)
    _report(stages, problems, shown=shown and inputs.arguments[0].should_log)
    return PreparedRun(inputs, model, processor, stages, held_out, problems, facts)


def _describe_inputs(inputs: RunInputs, model, processor) -> dict:
    """What the run is made from; UserError where it is continued with something else.

    Only the process that writes reads all that, and only for a run that writes.
    """
    if inputs.check or not inputs.arguments[0].should_save:
        return {}
    recipe = inputs.recipe
    facts = {"sources": {}, "model": {}}
    for stage, sources in zip(recipe.stages, inputs.sources, strict=True):
        facts["sources"][f"stage {stage.name}"] = describe_sources(sources)
    if any(args.eval_strategy != "no" for args in inputs.arguments):
        facts["sources"]["evaluate"] = [describe_examples(inputs.evaluation_examples)]
    if not inputs.num_finished:
        facts["model"] = describe_model(model, processor)
    elif model.is_upgrade and model.saves_fusion_only:
        # Its base was loaded again; the rest comes from the stage before.
        facts["model"] = describe_weights(model)
    if inputs.resume and is_begun(recipe, inputs.output):
        check_unchanged(inputs.output, facts)
    return facts


def build_encoder(stage: Stage, model, processor) -> ExampleEncoder:
    """The encoder of a stage's examples, with the limits of the stage and of the model."""
    limits = Limits(
        max_length=stage.max_length,
        model_limit=get_max_length(model),
        max_image_tokens=stage.max_image_tokens,
    )
    return example_encoder(processor, stage.template, limits)


def _load_start(inputs: RunInputs, model, processor) -> tuple:
    """The model that training starts with: the last finished stage's, the caller's, or new."""
    recipe = inputs.recipe
    if inputs.num_finished:
        return load(inputs.output / recipe.stages[inputs.num_finished - 1].name)
    set_seed(recipe.seed)  # fusion starts from random weights
    if model is not None:
        if is_sparsecut_model(model):
            return model, processor
        return upgrade(model, recipe.fusion, processor=processor)
    if recipe.model.base is None:
        vision = expand_path(recipe.model.vision)
        language = expand_path(recipe.model.language)
        return build(vision, language, recipe.fusion, **recipe.model.get_build_settings())
    base = expand_path(recipe.model.base)
    if is_saved(base):
        saved = load(base)
        return replan(*saved, recipe.fusion) if recipe.model.replan else saved
    if recipe.model.replan:
        raise UserError(
            f"replan is for a model saved by this package, but {base} is a pretrained VLM; remove"
            " replan, and it is upgraded"
        )
    return upgrade(base, recipe.fusion, dtype=_choose_base_dtype(recipe, inputs.arguments))


def _choose_base_dtype(recipe: Recipe, arguments: list[TrainingArguments]) -> torch.dtype:
    """The dtype of a base: half precision if it stays frozen and all stages compute in it.

    A base that is trained needs single precision.
    """
    if any(trains_base(stage) for stage in recipe.stages):
        return torch.float32
    for name, dtype in HALF_DTYPES.items():
        if all(getattr(args, name) for args in arguments):
            return dtype
    return torch.float32


def _check_model(recipe: Recipe, model) -> None:
    """Raise UserError where the model lacks what the recipe needs."""
    _check_plan(recipe, model)
    if recipe.feature_cache is not None and not model.supports_feature_cache:
        raise UserError(
            f"feature_cache is {recipe.feature_cache!r}, but vision features of an upgraded model"
            " cannot be cached, because its base runs the encoder itself; remove `feature_cache`"
        )
    for stage in recipe.stages:
        check_parts(model, stage.train)
        if stage.lora is not None:
            _check_adapters(stage, model)


def _check_adapters(stage: Stage, model) -> None:
    try:
        check_targets(model, stage.train, stage.lora)
    except UserError as error:
        raise UserError(f"stage {stage.name}: {error}") from error


def _check_plan(recipe: Recipe, model) -> None:
    if recipe.fusion is None:
        return
    plan = make_plan(recipe.fusion, model.config.vision_depth, model.config.language_depth)
    if model.is_upgrade and not plan.has_base_input:
        plan = plan.for_upgrade(fine=model.family.has_one_view(model.base))
    if plan != model.plan:
        raise UserError(
            f"the recipe's fusion gives the plan {plan}, but the model has {model.plan}; make them"
            " the same, leave fusion out, or write model.replan: true for a new plan"
        )


def _check_sources(
    stage: Stage,
    sources: list[SourceExamples],
    model,
    processor,
    *,
    open_images: bool,
    problems: list[RecordError],
) -> list[SourceExamples]:
    """The sources with their good examples; of a stream, the first ones."""
    encoder = build_encoder(stage, model, processor)
    unknown = UnknownCount()
    checked = []
    for entry in sources:
        if entry.source.streaming:
            examples = read_first_examples(entry.source, encoder, unknown=unknown)
        else:
            examples = check_examples(
                entry.examples,
                encoder,
                open_images=open_images,
                problems=problems if entry.source.on_error == "skip" else None,
                unknown=unknown,
            )
        checked.append(SourceExamples(entry.source, examples))
    for entry in checked:
        if not entry.examples:
            _raise_no_record(stage, entry.source, problems)
    for warning in unknown.check(stage.name, processor.tokenizer):
        logger.warning_once(warning)
    return checked


def _raise_no_record(stage: Stage, source: Source, problems: list[RecordError]) -> None:
    last = f", the last: {problems[-1]}" if problems else ""
    raise UserError(
        f"stage {stage.name}: the source {source.path} has no record left to train on;"
        f" {len(problems)} were skipped{last}"
    )


def _check_batches(prepared: PreparedStage, model, processor) -> None:
    """Raise UserError where a stage's batches cannot be made by its settings."""
    stage = prepared.stage
    if stage.pad_to is not None and model.is_upgrade:
        raise UserError(
            f"pad_to is {stage.pad_to}, but an upgraded model's own processor pads its batches;"
            " remove pad_to"
        )
    if stage.pack is not None:
        data = TrainingData(prepared.examples, build_encoder(stage, model, processor))
        with show_step("packing records into rows"):
            pack_dataset(data, model, stage)


def _choose_held_out(
    arguments: list[TrainingArguments], examples: list[Example], processor
) -> list[Example]:
    """A fixed choice of the evaluation's examples, for stages that are evaluated on the way."""
    evaluated = [args.output_dir for args in arguments if args.eval_strategy != "no"]
    if not evaluated:
        return []
    if not examples:
        raise UserError(
            f"stage {Path(evaluated[0]).name}: args.eval_strategy asks for an evaluation while"
            " training, but the recipe has no `evaluate`; add one with its data, or remove"
            " args.eval_strategy"
        )
    selected = select_examples(examples, keep=MAX_HELD_OUT)
    return check_examples(selected, example_encoder(processor))


def _report(stages: list[PreparedStage], problems: list[RecordError], *, shown: bool) -> None:
    if problems:
        logger.warning("%d records are skipped, the first: %s", len(problems), problems[0])
    if not shown:
        return
    for prepared in stages:
        examples = prepared.examples
        num_images = sum(len(example.images) for example in examples)
        size = f"{len(examples):,} records with {num_images:,} images"
        if prepared.is_stream:
            size = f"a stream of {len(prepared.sources)} sources"
        parts = ", ".join(prepared.stage.train)
        print_message(f"{prepared.stage.name}: {size}, training {parts}")
