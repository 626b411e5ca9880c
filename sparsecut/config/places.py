"""What a recipe names, checked before any model library is imported: folders, hub names, files."""

from __future__ import annotations

import glob
import os

from ..hub import check_model_place, looks_like_hub_name
from ..schema import UserError
from .recipe import Recipe
from .source import Source
from .yaml_io import expand_path

BUILT_IN = ("shapes", "world")  # names of the small backbones inside the package, new and old


def check_backbone_place(name: str, part: str) -> None:
    """Check that an encoder or language model is there, as `building.build` names it.

    Raises:
        UserError: It is neither built in, nor a folder, nor on the hub.
    """
    if name not in BUILT_IN:
        check_model_place(name, f"{part} model")


def check_model_places(recipe: Recipe) -> None:
    """Check that the models of a recipe are there.

    Raises:
        UserError: One is neither a folder nor on the hub.
    """
    model = recipe.model
    if model.base is not None:
        check_model_place(expand_path(model.base), "base model")
        return
    check_backbone_place(expand_path(model.vision), "vision")
    check_backbone_place(expand_path(model.language), "language")


def check_places(recipe: Recipe) -> None:
    """Check that the models and the data of a recipe are there.

    Raises:
        UserError: Something is missing.
    """
    evaluated = recipe.evaluate.data if recipe.evaluate else ()
    for stage in recipe.stages:
        for source in stage.data:
            check_source_place(source)
    for source in evaluated:
        check_source_place(source)
    check_model_places(recipe)


def check_source_place(source: Source) -> None:
    """Check that a source's files and images are there; a data set of the hub is not asked for.

    Raises:
        UserError: They are not.
    """
    path = expand_path(source.path)
    is_hub_name = looks_like_hub_name(path) and path.count("/") == 1
    # A count of files, as in {0..9}, is read where the files are.
    if not (is_hub_name or "{" in path or _exists(path) or glob.glob(path)):
        raise UserError(
            f"there is no file or folder {path}, which `data` names; correct the path, or make it"
            " first, as the comment at the top of the recipe may describe"
        )
    if source.images is not None and not _exists(expand_path(source.images)):
        raise UserError(
            f"there are no images at {expand_path(source.images)}: give an existing folder or tar"
            " archive as `images`"
        )


def _exists(path: str) -> bool:
    try:
        return os.path.exists(path)
    except ValueError:  # no path has a NUL character
        return False
