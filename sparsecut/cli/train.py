"""`sparsecut train`: train by a recipe, check it, or estimate what it takes."""

from __future__ import annotations

import math
import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..config.shipped import find_shipped
from ..schema import UserError
from .app import (
    File,
    app,
    argument,
    check_output_folder,
    echo,
    option,
    print_marked,
    print_scores,
)
from .completion import complete_shipped
from .stopping import repeat_command

if TYPE_CHECKING:
    from ..config.recipe import Recipe


DEFAULT_MFU = 0.4


@app.command()
def train(
    recipe: Annotated[
        Path,
        argument(
            "A recipe file (YAML), or a name of `sparsecut recipes`.",
            complete=complete_shipped("recipe"),
        ),
    ],
    overrides: Annotated[
        list[str] | None,
        argument("Changed values, such as stages.0.args.max_steps=10 output=runs/b"),
    ] = None,
    check: Annotated[
        bool,
        option("Read all records and images, show one of each stage, then stop.", "--check"),
    ] = False,
    save_images: Annotated[
        File,
        option(
            "With --check: folder to write the shown images to, with their views.",
            callback=check_output_folder,
        ),
    ] = None,
    resume: Annotated[
        bool, option("Continue after the last finished stage or checkpoint.", "--resume")
    ] = False,
    overwrite: Annotated[
        bool, option("Replace the run that the output folder holds.", "--overwrite")
    ] = False,
    dry_run: Annotated[
        bool,
        option("Estimate sizes, memory, steps and hours without loading weights.", "--dry-run"),
    ] = False,
    devices: Annotated[
        int | None, option("Number of devices for the dry run. Default: 1.", min=1)
    ] = None,
    tflops: Annotated[
        float | None,
        option("Peak TFLOP/s of a device (H100: 989). Default: measured on this machine."),
    ] = None,
    mfu: Annotated[
        float | None, option("Fraction of the peak that training reaches. Default: 0.4.")
    ] = None,
    json: Annotated[bool, option("Print the dry run as JSON.", "--json")] = False,
) -> None:
    """Train by a recipe, stage after stage, then evaluate if the recipe has `evaluate`."""
    from ..config.recipe import load_recipe

    loaded_recipe = load_recipe(recipe, overrides or [])
    if not recipe.is_file():
        _draw_missing_images(recipe, loaded_recipe)
    from ..config.places import KNOWN_SIZES, check_model_places, check_places
    from .early_checks import check_recipe

    check_recipe(loaded_recipe, writes=not dry_run)
    _check_machine(dry_run, devices, tflops, mfu)
    if dry_run:
        check_model_places(loaded_recipe, KNOWN_SIZES)
        _print_dry_run(
            loaded_recipe, json, devices=devices or 1, tflops=tflops, mfu=mfu or DEFAULT_MFU
        )
        return
    if json:
        raise UserError("--json prints a dry run, so it needs --dry-run; add it")
    check_places(loaded_recipe)
    if os.environ.get("RANK", "0") == "0":  # what others write in this moment is no earlier run
        _check_run_folder(loaded_recipe, resume=resume, overwrite=overwrite, check=check)
    if check:
        _check(loaded_recipe, save_images, resume=resume, overwrite=overwrite)
        echo(f"{recipe} can be trained")
        return
    if save_images:
        raise UserError("--save-images writes what --check shows; add --check, or leave it out")
    from ..training.stages import train

    model, processor = train(loaded_recipe, resume=resume, overwrite=overwrite)
    is_first_process = os.environ.get("RANK", "0") == "0"
    if loaded_recipe.evaluate and is_first_process:
        _evaluate(loaded_recipe, model, processor, resume)


def _check_run_folder(recipe: Recipe, **settings: bool) -> None:
    """Raise UserError where the output folder holds a run that is not to be gone on with."""
    from ..config.yaml_io import expand_path
    from ..training.run_dir import check_output

    check_output(recipe, Path(expand_path(recipe.output)), **settings)


def _check_machine(
    is_dry_run: bool, devices: int | None, tflops: float | None, mfu: float | None
) -> None:
    """Raise UserError for a machine that cannot be, or that nothing is estimated for."""
    given = {"--devices": devices, "--tflops": tflops, "--mfu": mfu}
    names = [name for name, value in given.items() if value is not None]
    if names and not is_dry_run:
        raise UserError(
            f"{', '.join(names)} describes a machine to --dry-run; add that, or leave it out"
        )
    if tflops is not None and not 0 < tflops < math.inf:
        raise UserError(f"--tflops is {tflops}, but must be above 0")
    if mfu is not None and not 0 < mfu <= 1:
        raise UserError(f"--mfu is {mfu}, but a fraction lies above 0 and is at most 1")


def _check(recipe: Recipe, folder: Path | None, **settings: bool) -> None:
    """Check a recipe, and show one record of each stage as the model sees it."""
    from ..training.preview import describe_counts, preview_run, save_sheets
    from ..training.stages import check_recipe

    previews = preview_run(check_recipe(recipe, **settings))
    if os.environ.get("RANK", "0") != "0":
        return
    for preview in previews:
        echo(f"\nstage {preview.stage}, {preview.place} (what is learned is green, or [[so]]):\n")
        print_marked([(piece.text, piece.is_learned) for piece in preview.pieces])
        echo("\n" + "\n".join(describe_counts(preview)))
    if folder is not None:
        for file in save_sheets(previews, folder):
            echo(f"wrote {file}")
    echo()


def _draw_missing_images(name: Path, recipe: Recipe) -> None:
    """Draw the images of a recipe that ships with the package, by the commands at its head."""
    shipped = find_shipped(name.as_posix(), ["recipe"])
    if shipped is None or "RANK" in os.environ:  # processes would draw over one another
        return
    sources = [source for stage in recipe.stages for source in stage.data]
    for command in shipped.list_commands():
        words = shlex.split(command)
        if words[1:3] != ["shapes", "draw"] or Path(words[3]).exists():
            continue
        if any(Path(source.path).is_relative_to(words[3]) for source in sources):
            echo(f"drawing the images first: {command}")
            typer.main.get_command(app).main(words[1:], "sparsecut", standalone_mode=False)


def _print_dry_run(recipe, as_json: bool, **machine) -> None:
    from ..profiling import dry_run

    plans = dry_run.dry_run(recipe, **machine)
    text = dry_run.to_json(plans) if as_json else dry_run.format_estimates(plans, **machine)
    echo(text)


def _evaluate(recipe, model, processor, resume: bool) -> None:
    from ..config.yaml_io import expand_path
    from ..evaluation.evaluator import evaluate_recipe

    output = Path(expand_path(recipe.output))
    try:
        result = evaluate_recipe(recipe, model, processor, resume=resume)
    except Exception as error:
        rest = (
            f"training is done, and its model is safe in {output / 'final'}; evaluation goes on"
            f" with: {repeat_command('--resume')}"
        )
        if isinstance(error, UserError):
            raise UserError(f"{error}; {rest}") from error
        error.add_note(rest)
        raise
    print_scores(result, output / "eval")
