"""What a recipe names, checked before any model library is imported: folders, hub names, files."""

from __future__ import annotations

import glob
import os
from collections.abc import Collection
from pathlib import Path

from ..hub import check_dataset_place, check_model_place
from ..schema import UserError, nearest
from .mistaken_files import find_neighbour, name_kind
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
# Blocks or layers of those that `cost` knows by a name of its own.
DEPTHS = {
    "vision": {"clip-l-336": 24, "siglip-so400m-384": 27},
    "language": {"llama-7b": 32, "llama-13b": 40},
}
MODEL_FACTS = ("config.json", "fusion.json", "adapter_config.json", "params.json")
BUILT_IN = ("shapes", "world")  # names of the small backbones inside the package, new and old


def check_model_files(name: str, what: str = "model") -> None:
    """Check that a model is there and, where it is a folder, that the folder can hold a model.

    Raises:
        UserError: There is none, or it is a file, or a folder without a model's files.
    """
    kind = name_kind(name)
    if kind is not None and not os.path.exists(name):
        raise UserError(
            f"there is no {name}, which is {kind} by its name, but the {what} is a folder or a hub"
            " name; give one of them"
        )
    check_model_place(name, what)
    folder = Path(name)
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UserError(
            f"{name!r} is a file, but the {what} is a folder; give the one that training or"
            " save_pretrained wrote"
        )
    if not any((folder / file).is_file() for file in MODEL_FACTS):
        raise UserError(
            f"{name!r} holds no config.json, so it is not a saved {what}; give the folder that"
            f" training or save_pretrained wrote, for example {folder}/final"
        )


def check_size_place(name: str, part: str) -> None:
    """Check that `cost` knows a size by this name, or that a model of it is there.

    Args:
        name: A known size, "shapes", a folder, or a hub name.
        part: "vision" or "language".

    Raises:
        UserError: It is none of them.
    """
    known = (*DEPTHS[part], BUILT_IN[0])
    if name in known or os.path.isdir(name):
        return
    is_other = any(name in sizes for sizes in DEPTHS.values())
    hint = nearest(name, known)
    if is_other or (hint and name not in BUILT_IN):
        raise UserError(
            f"the {part} model {name!r} is neither a known size{hint} nor a folder or hub name that"
            f" can be read; known sizes are {', '.join(known)}"
        )


def check_backbone_place(name: str, part: str) -> None:
    """Check that an encoder or language model is there, as `building.build` names it.

    Raises:
        UserError: It is neither built in, nor a folder, nor on the hub.
    """
    if name not in BUILT_IN:
        check_model_files(name, f"{part} model")


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
            check_model_files(base, "base model")
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
            check_source_place(source, in_recipe=True)
    for source in evaluated:
        check_source_place(source, in_recipe=True)
    check_model_places(recipe)


def check_source_place(source: Source, *, in_recipe: bool = False) -> None:
    """Check that a source's files and images are there, or that the hub has the data set.

    Args:
        source: The source.
        in_recipe: Whether a recipe names it, whose head may say how it is made.

    Raises:
        UserError: They are not.
    """
    path = expand_path(source.path)
    # A count of files, as in {0..9}, is read where the files are.
    is_here = "{" in path or _exists(path) or bool(glob.glob(path))
    if not is_here and looks_like_dataset_name(path):
        check_dataset_place(path, source.revision)
    elif not is_here:
        how = ", as the comment at the top of the recipe may describe" if in_recipe else ""
        raise UserError(
            f"there is no file or folder {path}{find_neighbour(path)}, which `data` names; correct"
            f" the path, or make it first{how}"
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
