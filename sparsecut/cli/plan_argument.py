"""What a user types for a plan: a method's name, a file, or a saved model's folder."""

from __future__ import annotations

import json
from pathlib import Path

from ..config.mistaken_files import read_settings_file
from ..config.paths import list_code_files
from ..config.places import BUILT_IN
from ..config.recipe import parse_recipe
from ..config.shipped import FILE_TYPES, find_shipped, list_shipped
from ..config.yaml_io import expand_path, read_yaml
from ..drawing import draw
from ..methods import METHODS, make_plan
from ..plan import Plan
from ..schema import UserError, nearest
from ..shipped_model import read_backbone_depth

DEFAULT_DEPTHS = (24, 32)  # CLIP-L and a 7B language model
UPGRADE_METHOD = "sparsecut"  # of a plan for a pretrained VLM that nobody names
MODEL_FILES = (
    *("model*.safetensors*", "fusion.safetensors", "generation_config.json", "tokenizer*.json"),
    *("processor_config.json", "preprocessor_config.json", "chat_template.*", "adapters"),
)
PLAN_KINDS = ("recipe", "plan")  # what holds a plan


def draw_argument(
    argument: str, vision_depth: int | None, language_depth: int | None, options: list[str]
) -> tuple[Plan, str]:
    """Draw the plan of a method, a file or a saved model.

    Args:
        argument: A method's name, the path of a recipe or plan, the name of a recipe that ships
            with the package, or a saved model's folder.
        vision_depth: Number of encoder blocks. None takes the recipe's model's, if it is on this
            machine, else 24.
        language_depth: Number of decoder layers. None takes the model's in the same way, else 32.
        options: A method's options, as "key=value".

    Returns:
        The plan, and its drawing.

    Raises:
        UserError: There is no such plan, or it does not fit the depths.
    """
    for depth in (vision_depth, language_depth):
        if depth is not None and depth < 1:
            raise UserError(f"a depth of {depth} was given, but models have at least 1 layer")
    # A method may share its name with a folder here.
    if argument not in METHODS and Path(argument).is_dir():
        if vision_depth is not None or language_depth is not None or options:
            raise UserError(
                f"{argument} is a saved model with depths and a plan of its own; leave out depths"
                " and options"
            )
        return _draw_saved(Path(argument))
    stated_depths = _find_depths(argument)
    vision_depth = vision_depth or stated_depths[0] or DEFAULT_DEPTHS[0]
    language_depth = language_depth or stated_depths[1] or DEFAULT_DEPTHS[1]
    plan = make_plan(read_plan(argument, options), vision_depth, language_depth)
    return plan, draw(plan, vision_depth, language_depth, title=argument)


def read_plan(argument: str, options: list[str]) -> dict:
    """Read what `make_plan` takes from a method's name or a file.

    Args:
        argument: A method's name, or a plan or a recipe, whose `fusion` is taken: a path, or the
            name of one that ships with the package.
        options: Options as "key=value", which replace those of the file.

    Raises:
        UserError: There is no such method or file, or an option is not "key=value".
    """
    if argument.endswith(FILE_TYPES):
        spec = _read_file(str(_find_path(argument)))
    elif argument in METHODS:
        spec = argument
    elif (shipped := find_shipped(argument, PLAN_KINDS)) is not None:
        spec = _read_file(str(shipped.path))
    else:
        names = [*METHODS, *(one.name for one in list_shipped("recipe"))]
        raise UserError(
            f"{argument!r} is no method{nearest(argument, names)}, no file, no recipe that ships"
            f" with the package and no saved model's folder; methods are {', '.join(METHODS)}"
        )
    spec = {"method": spec} if isinstance(spec, str) else dict(spec)
    for option in options:
        key, equals, value = option.partition("=")
        if not key or not equals:
            raise UserError(f"the option {option!r} is not key=value; write for example count=4")
        spec[key] = read_yaml(value, f"option {key}")
    return spec


def _find_path(argument: str) -> Path:
    """The file that is named, or one of that name which ships with the package."""
    path = Path(argument)
    shipped = None if path.is_file() else find_shipped(argument, PLAN_KINDS)
    return path if shipped is None else shipped.path


def read_upgrade_plan(argument: str | None, options: list[str]) -> dict | None:
    """Read what `upgrade` takes, so that a cost is that of the model which `upgrade` makes.

    Args:
        argument: As in `read_plan`. Nothing, or `sparsecut` without options, is the default plan
            of an upgrade, whose projectors are narrow.
        options: As in `read_plan`.

    Returns:
        The plan's values, or None for the default.
    """
    argument = argument or UPGRADE_METHOD
    if argument == UPGRADE_METHOD and not options:
        return None
    return read_plan(argument, options)


def _read_file(file: str) -> str | dict:
    """The plan of a plan file or a recipe."""
    if not Path(file).is_file():
        raise UserError(
            f"there is no file {file}; give a recipe or plan, or one of the methods"
            f" {', '.join(METHODS)}"
        )
    values = read_settings_file(Path(file), "plan")
    if isinstance(values, dict) and "stages" in values:
        recipe = parse_recipe(values, name=file)
        if recipe.fusion is None:
            raise UserError(
                f"{file} leaves the plan to its base, {recipe.model.base}; give that if it is a"
                " saved model, or add `fusion`"
            )
        return recipe.fusion
    if not isinstance(values, dict) or not {"method", "shortcuts"} & set(values):
        raise UserError(
            f"{file} holds neither a recipe (stages: ...) nor a plan (method: ... or shortcuts:"
            " ...)"
        )
    return values


def _draw_saved(folder: Path) -> tuple[Plan, str]:
    """The plan of a saved model, or of shortcuts that are saved without their base."""
    fusion_file = folder / "fusion.json"
    if fusion_file.is_file():
        from ..upgrading import read_facts

        facts = read_facts(folder)
        plan = Plan.from_dict(facts["plan"])
        title = f"{folder}, shortcuts of {facts['base']}"
        return plan, draw(plan, *facts["depths"], title=title)
    if not (folder / "config.json").is_file():
        raise UserError(
            f"{folder} holds no config.json, so it is not a saved model; give the folder that"
            " holds one"
        )
    config = _read_config(folder)
    if not hasattr(config, "get_plan"):
        raise UserError(
            f"{folder} holds a {config.model_type}, which has no plan; give a model that this"
            " package has saved"
        )
    return config.get_plan(), _draw_config(config.get_plan(), config, title=str(folder))


def _read_config(folder: Path):
    from transformers import AutoConfig

    from ..loading import load_pretrained

    complaint = f"{folder}/config.json cannot be read; save or fetch the model again"
    return load_pretrained(AutoConfig, folder, complaint)


def _draw_config(plan: Plan, config, title: str | None = None) -> str:
    # An upgraded model has its base's geometry, so its configuration has no patches.
    patches = getattr(config, "num_patches", None)
    depths = (config.vision_depth, config.language_depth)
    return draw(plan, *depths, num_patches=patches, title=title)


def _find_depths(argument: str) -> tuple[int | None, int | None]:
    """Depths of a recipe's two models, None for each that is not on this machine."""
    file = _find_path(argument)
    if argument in METHODS or file.suffix not in FILE_TYPES or not file.is_file():
        return None, None
    values = read_settings_file(file, "plan")
    if not isinstance(values, dict) or "stages" not in values:
        return None, None
    model = parse_recipe(values, name=argument).model
    return _read_depth(model.vision, "vision"), _read_depth(model.language, "language")


def _read_depth(source: str | None, part: str) -> int | None:
    if source is None:
        return None
    if source in BUILT_IN:
        return read_backbone_depth(part)
    folder = Path(expand_path(source))
    if not (folder / "config.json").is_file():
        return None
    from ..encoders import count_blocks

    config = _read_config(folder)
    config = getattr(config, f"{part}_config", config)
    return count_blocks(config) if part == "vision" else config.get_text_config().num_hidden_layers


def describe_model(model) -> str:
    """Return a built model's drawing, with its image tokens and parameters."""
    lines = [_draw_config(model.plan, model.config)]
    for part, count in model.count_parameters().items():
        if part != "head":
            lines.append(f"  {part:13} {count:,} parameters")
    return "\n".join(lines)


def format_json(plan: Plan) -> str:
    """Return a plan as JSON with one shortcut a line."""
    values = plan.to_dict()
    shortcuts = [f"  {json.dumps(shortcut)}" for shortcut in values.pop("shortcuts")]
    lines = [f" {json.dumps(key)}: {json.dumps(value)}," for key, value in values.items()]
    return "\n".join(["{", *lines, ' "shortcuts": [', ",\n".join(shortcuts), " ]", "}"])


def parse_numbers(name: str, text: str | None) -> list[int] | None:
    """Parse whole numbers with commas between them.

    Args:
        name: The option's name, for errors.
        text: What was typed. "none" gives an empty list, and None stays None.

    Raises:
        UserError: The text holds something else.
    """
    if text is None:
        return None
    if text == "none":
        return []
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise UserError(
            f"{name} is {text!r}, but must be whole numbers with commas, as 0,3,6, or none"
        ) from None


def check_no_model(out: Path) -> None:
    """Raise UserError where a folder holds a model, or files that one would replace."""
    if (out / "config.json").exists() or (out / "fusion.json").exists():
        raise UserError(f"{out} holds a model already; choose another folder or remove it first")
    patterns = [*MODEL_FILES, *list_code_files()]
    present = sorted(path.name for pattern in patterns for path in out.glob(pattern))
    if present:
        raise UserError(
            f"{out} holds {', '.join(present[:3])}, which a model's files would replace; choose"
            " another folder or move it away"
        )
