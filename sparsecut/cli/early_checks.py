"""What was typed, checked before a model library is imported, so mistakes are told at once."""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING

from ..config.paths import check_writable_folder
from ..config.places import BUILT_IN, DEPTHS
from ..config.shipped import find_deepspeed
from ..config.yaml_io import expand_path
from ..methods import check_method, make_plan
from ..schema import TYPE_NAMES, UserError, nearest, show_value, suggest_value
from ..shipped_model import read_backbone_depth

if TYPE_CHECKING:
    from ..config.recipe import Recipe

DTYPES = ("auto", "bfloat16", "float16", "float32")
# Kinds of devices that torch knows, in the order of its own message.
DEVICE_KINDS = (
    *("cpu", "cuda", "ipu", "xpu", "mkldnn", "opengl", "opencl", "ideep", "hip", "ve", "fpga"),
    *("maia", "xla", "lazy", "vulkan", "mps", "meta", "hpu", "mtia", "privateuseone", "npu", "mlu"),
)
URL_STARTS = ("http:", "https:", "data:")
ARGUMENT = re.compile(r"^    (\w+)\s*:([^=\n]*)", re.MULTILINE)  # a name and its annotation
SIMPLE_TYPES = {"int": int, "float": float, "bool": bool, "None": NoneType}
OLD_CHECKPOINTING = re.compile(r"(gradient|activation)_checkpointing(_kwargs)?")


def check_dtype(dtype: str) -> str:
    """Return the dtype that --dtype names.

    Raises:
        UserError: It is unknown.
    """
    if dtype not in DTYPES:
        raise UserError(
            f"--dtype is {dtype!r}{nearest(dtype, DTYPES)}; allowed are {', '.join(DTYPES)}"
        )
    return dtype


def check_device(device: str | None) -> str | None:
    """Return the device that --device names; whether it is here is asked later.

    Raises:
        UserError: No device can have that name.
    """
    kind, colon, index = (device or "cpu").partition(":")
    if colon and not index.isdigit():
        raise UserError(
            f"--device is {device!r}, but after the colon stands a number, as in cuda:0"
        )
    # Another maker's package may add a kind, under a name that is not known here.
    looks_mistyped = kind not in DEVICE_KINDS and nearest(kind, DEVICE_KINDS)
    if looks_mistyped or not re.fullmatch(r"[a-z_]\w*", kind):
        raise UserError(
            f"--device is {device!r}{nearest(kind, DEVICE_KINDS)}, which is no device; give cpu,"
            " cuda, cuda:0, mps or xpu, or leave it out"
        )
    return device


def check_files(paths: Sequence[Path] | None, medium: str) -> None:
    """Check that files of images or sound are there.

    Raises:
        UserError: One is not.
    """
    for path in paths or ():
        if str(path).startswith(URL_STARTS):
            continue
        try:
            is_file = path.expanduser().is_file()
        except (OSError, ValueError, RuntimeError):  # longer than a path may be, or no path at all
            is_file = False
        if not is_file:
            raise UserError(
                f"there is no {medium} {str(path)[:300]}; give the path of a file with one"
            )


def check_spec(spec: str | dict | None, vision: str | None = None, language: str | None = None):
    """Check a plan as far as that is possible without its models.

    Where both models are of known depths, all of the plan is checked, else the names and types of
    a method's options.

    Args:
        spec: What `make_plan` takes, or None for a default.
        vision: The encoder, by name or folder.
        language: The language model, by name or folder.

    Raises:
        UserError: The plan cannot be made.
    """
    if spec is None:
        return
    check_method(spec)
    depths = _find_depth(vision, "vision"), _find_depth(language, "language")
    if None not in depths:
        make_plan(spec, *depths)


def _find_depth(source: str | None, part: str) -> int | None:
    if source in BUILT_IN:
        return read_backbone_depth(part)
    return DEPTHS[part].get(source or "")


def check_recipe(recipe: Recipe, *, writes: bool = True) -> None:
    """Check what a recipe names beside its models and data: plan, folder and arguments.

    Args:
        recipe: The recipe.
        writes: Whether its output folder is written.

    Raises:
        UserError: Training would refuse it.
    """
    model = recipe.model
    check_spec(recipe.fusion, model.vision, model.language)
    if writes:
        check_writable_folder(expand_path(recipe.output))
    known = find_training_arguments()
    for stage in recipe.stages:
        for name, value in stage.args.items():
            if known and name not in known and not OLD_CHECKPOINTING.fullmatch(name):
                raise UserError(
                    f"stage {stage.name}: args.{name} is not an argument of transformers'"
                    f" TrainingArguments{nearest(name, known)}"
                )
            _check_simple_type(f"stage {stage.name}: args.{name}", value, known.get(name, ""))
            if name == "deepspeed" and isinstance(value, str):
                find_deepspeed(value)


def _check_simple_type(key: str, value: object, annotation: str) -> None:
    """Raise UserError for text where an annotation wants a number, or true or false."""
    kinds = {SIMPLE_TYPES.get(part) for part in re.split(r"\s*\|\s*", annotation.strip())}
    if not isinstance(value, str) or None in kinds:
        return
    allowed = [kind for kind in (int, float, bool) if kind in kinds]
    names = " or ".join(TYPE_NAMES[kind] for kind in allowed)
    remedy = suggest_value(key, value, allowed)
    raise UserError(f"{key} is {show_value(value)}, but must be {names}{remedy}")


def find_training_arguments() -> dict[str, str]:
    """Names that `TrainingArguments` may take, and types, read from its source without an import.

    It holds all fields and perhaps words of a docstring. It is empty where there is no source.
    """
    spec = find_spec("transformers")
    names: dict[str, str] = {}
    for folder in (spec and spec.submodule_search_locations) or ():
        file = Path(folder) / "training_args.py"
        if file.is_file():
            found = ARGUMENT.findall(file.read_text("utf-8"))
            names |= dict(reversed(found))  # of two lines with one name the first is the field
    return names if "max_steps" in names else {}


def check_holds(folder: Path, names: Sequence[str], remedy: str) -> None:
    """Check that a folder holds one of some files.

    Raises:
        UserError: It holds none.
    """
    if not any(list(folder.glob(name)) for name in names):
        raise UserError(f"{folder} holds no {' or '.join(names)}; {remedy}")
