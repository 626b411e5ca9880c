"""First part of a run: read the recipe, its arguments and its records.

Nothing is built and nothing is written here.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from transformers import TrainingArguments

from ..config.recipe import Recipe, Source, Stage, load_recipe
from ..config.yaml_io import expand_path
from ..data.errors import RecordError
from ..data.examples import Example, read_source
from ..waits import show_step
from .arguments import build_arguments
from .run_dir import check_output, count_finished_stages


@dataclass(frozen=True)
class SourceExamples:
    """A source of a stage with its examples.

    Attributes:
        source: The source, as the recipe names it.
        examples: Its examples. A stream is not read beforehand: it has none until it is checked,
            and then its first ones.
    """

    source: Source
    examples: list[Example]


@dataclass(frozen=True)
class RunInputs:
    """What a run reads before anything is built.

    Attributes:
        recipe: The recipe.
        output: Its output folder.
        arguments: Checked arguments of every stage's Trainer.
        sources: The sources of every stage, with their examples.
        evaluation_examples: Examples of the recipe's `evaluate`.
        problems: Records that were left out, as far as their sources allow it.
        check: Whether to stop before the first step; every image is then opened.
        num_finished: Stages that are complete on disk already, where the run is resumed.
        resume: Whether to continue what the output folder holds.
        overwrite: Whether to replace what it holds.
    """

    recipe: Recipe
    output: Path
    arguments: list[TrainingArguments]
    sources: list[list[SourceExamples]]
    evaluation_examples: list[Example]
    problems: list[RecordError]
    check: bool
    num_finished: int
    resume: bool
    overwrite: bool


def read_inputs(
    recipe: Recipe | str | Path,
    *,
    check: bool = False,
    resume: bool = False,
    overwrite: bool = False,
) -> RunInputs:
    """Read everything that a recipe names, except for models.

    Args:
        recipe: The recipe, or its file.
        check: Whether the run stops before the first step; images of `evaluate` are then opened.
        resume: Whether to continue what the output folder holds.
        overwrite: Whether to replace what it holds.

    Returns:
        What was read.

    Raises:
        UserError: If an argument, the output folder or a record cannot be used.
    """
    if not isinstance(recipe, Recipe):
        recipe = load_recipe(recipe)
    output = Path(expand_path(recipe.output))
    arguments = [build_arguments(stage, recipe.seed, output) for stage in recipe.stages]
    check_output(recipe, output, resume=resume, overwrite=overwrite, check=check)
    problems: list[RecordError] = []
    sources = [_read_sources(stage, problems) for stage in recipe.stages]
    evaluation_examples = _read_evaluation(recipe, problems)
    if check:
        with show_step("opening the images of evaluate", len(evaluation_examples)) as step:
            for example in step.count(evaluation_examples):
                example.load_images()
    continues = resume and not check
    return RunInputs(
        recipe=recipe,
        output=output,
        arguments=arguments,
        sources=sources,
        evaluation_examples=evaluation_examples,
        problems=problems,
        check=check,
        num_finished=count_finished_stages(recipe, output) if continues else 0,
        resume=resume,
        overwrite=overwrite,
    )


def _read_sources(stage: Stage, problems: list[RecordError]) -> list[SourceExamples]:
    sources = []
    for source in stage.data:
        examples = [] if source.streaming else read_source(source, problems)
        sources.append(SourceExamples(source, examples))
    return sources


def _read_evaluation(recipe: Recipe, problems: list[RecordError]) -> list[Example]:
    examples = []
    if recipe.evaluate is not None:
        for source in recipe.evaluate.data:
            examples += read_source(source, problems)
    return examples
