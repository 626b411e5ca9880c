"""What a recipe names, checked before any model library is imported: folders, hub names, files."""

from __future__ import annotations

import glob
import os
from collections.abc import Collection

from ..hub import check_dataset_place, check_model_place
from ..schema import UserError
from .recipe import Recipe
from .source import Source, looks_like_dataset_name
from .yaml_io import expand_path

# Models whose sizes are known without their files, for estimates (`profiling.sizes`).
KNOWN_SIZES = (
    *("clip-l-336", "siglip-so400m-384", "llama-7b", "llama-13b"),
    *("openai/clip-vit-large-patch14-336", "google/siglip-base-patch16-256"),
    *("lmsys/vicuna-7b-v1.5", "lmsys/vicuna-13b-v1.5", "HuggingFaceTB/SmolLM2-135M-Instruct"),
    "llava-hf/llava-1.5-7b-hf",
)
BUILT_IN = ("shapes", "world")  # names of the small backbones inside the package, new and old


def check_backbone_place(name: str, part: str) -> None:
    """Check that an encoder or language model is there, as `building.build` names it.

    Raises:
        UserError: It is neither built in, nor a folder, nor on the hub.
    """
    if name not in BUILT_IN:
        check_model_place(name, f"{part} model")


def check_model_places(recipe: Recipe, known: Collection[str] = ()) -> None:
    """Check that the models of a recipe are there.

    Args:
        recipe: The recipe.
        known: Names that are not looked for.

    Raises:
        UserError: One is neither a folder nor on the hub.
    """
    model = recipe.model
    if model.base is not None:
        base = expand_path(model.base)
        if base not in known:
            check_model_place(base, "base model")
        return
    for name, part in ((model.vision, "vision"), (model.language, "language")):
        if expand_path(name) not in known:
            check_backbone_place(expand_path(name), part)


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
    """Check that a source's files and images are there, or that the hub has the data set.

    Raises:
        UserError: They are not.
    """
    path = expand_path(source.path)
    # A count of files, as in {0..9}, is read where the files are.
    is_here = "{" in path or _exists(path) or bool(glob.glob(path))
    if not is_here and looks_like_dataset_name(path):
        check_dataset_place(path, source.revision)
    elif not is_here:
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
