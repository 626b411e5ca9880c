"""From what a user types to a plan and its drawing: a method's name, a file, or a saved model's
folder.
"""

from __future__ import annotations

import json
from pathlib import Path

from ..config.recipe import parse_recipe
from ..config.yaml_io import expand_path, read_yaml
from ..drawing import draw
from ..methods import METHODS, make_plan
from ..plan import Plan
from ..schema import UserError, nearest

DEPTHS = 24, 32  # CLIP-L and a 7B language model
SHAPES_FOLDER = Path(__file__).parents[1] / "shapes" / "weights"
FILES = (".yaml", ".yml", ".json")


def sketch(
    what: str, vision_depth: int | None, language_depth: int | None, options: list[str]
) -> tuple[Plan, str]:
    """The plan of a method, a file or a model, and its drawing; depths that are not given come from
    the models, if they are near.
    """
    if (vision_depth is not None and vision_depth < 1) or (
        language_depth is not None and language_depth < 1
    ):
        raise UserError(
            f"the depths are {vision_depth} and {language_depth}, but must be at least 1"
        )
    if (
        what not in METHODS and Path(what).is_dir()
    ):  # a method may share its name with a folder here
        return _saved(what, vision_depth, language_depth, options)
    found = _near_depths(what)
    depths = vision_depth or found[0] or DEPTHS[0], language_depth or found[1] or DEPTHS[1]
    plan = make_plan(read_plan(what, options), *depths)
    return plan, draw(plan, *depths, title=what)


def read_plan(what: str, options: list[str]) -> str | dict:
    """What `make_plan` takes: a method with options ("key=value"), or the plan of a file, alone or
    as a recipe's `fusion`.
    """
    if not what.endswith(FILES):
        if what not in METHODS:
            raise UserError(
                f"{what!r} is no method{nearest(what, METHODS)}, no file and no saved model's"
                f" folder; methods are {', '.join(METHODS)}"
            )
        spec = {"method": what}
    else:
        spec = _from_file(what)
        spec = {"method": spec} if isinstance(spec, str) else spec
    for option in options:
        key, equals, value = option.partition("=")
        if not key or not equals:
            raise UserError(f"the option {option!r} is not key=value; write for example count=4")
        spec = {**spec, key: read_yaml(value, f"option {key}")}
    return spec


def describe(model) -> str:
    """A built model: its plan drawn, image tokens and parameters."""
    config = model.config
    patches = getattr(
        config, "num_patches", None
    )  # a base that was upgraded has a geometry of its own
    drawing = draw(model.plan, config.vision_depth, config.language_depth, num_patches=patches)
    counts = {
        part: sum(p.numel() for p in values)
        for part, values in model.parameter_groups().items()
        if part != "head"
    }
    return "\n".join(
        [drawing, *(f"  {part:13} {count:,} parameters" for part, count in counts.items())]
    )


def as_json(plan: Plan) -> str:
    """A plan as JSON with one shortcut a line."""
    plain = plan.to_dict()
    shortcuts = ",\n".join(f"  {json.dumps(s)}" for s in plain.pop("shortcuts"))
    rest = ",\n".join(f" {json.dumps(key)}: {json.dumps(value)}" for key, value in plain.items())
    return f'{{\n{rest},\n "shortcuts": [\n{shortcuts}\n ]\n}}'


def numbers(name: str, text: str | None) -> list[int] | None:
    """Whole numbers with commas between them; "none" is an empty list, and nothing stays
    nothing.
    """
    if text is None or text == "none":
        return None if text is None else []
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise UserError(
            f"{name} is {text!r}, but must be whole numbers with commas, as 0,3,6, or none"
        ) from None


def refuse_model_in(out: Path) -> None:
    """Raise ValueError where a folder holds a model that would be written over."""
    if (out / "config.json").exists() or (out / "fusion.json").exists():
        raise UserError(f"{out} holds a model already; choose another folder or remove it first")


def _from_file(what: str) -> str | dict:
    path = Path(what)
    if not path.is_file():
        raise UserError(
            f"there is no file {what}; give a recipe or plan, or one of the methods"
            f" {', '.join(METHODS)}"
        )
    plain = read_yaml(path.read_text(encoding="utf-8"), what)
    if isinstance(plain, dict) and "stages" in plain:
        recipe = parse_recipe(plain, name=what)
        if recipe.fusion is None:
            raise UserError(
                f"{what} leaves the plan to its base, {recipe.model.base}; give that if it is a"
                " saved model, or add `fusion`"
            )
        return recipe.fusion
    if not isinstance(plain, dict) or not {"method", "shortcuts"} & set(plain):
        raise UserError(
            f"{what} holds neither a recipe (stages: ...) nor a plan (method: ... or shortcuts:"
            " ...)"
        )
    return plain


def _saved(
    folder: str, vision_depth: int | None, language_depth: int | None, options: list[str]
) -> tuple[Plan, str]:
    """A saved model's own plan and depths, read from its config.json."""
    if vision_depth is not None or language_depth is not None or options:
        raise UserError(
            f"{folder} is a saved model with depths and a plan of its own; leave out depths and"
            " options"
        )
    if (apart := Path(folder) / "fusion.json").is_file():  # shortcuts kept apart from their base
        facts = json.loads(apart.read_text(encoding="utf-8"))
        plan, depths = Plan.from_dict(facts["plan"]), facts["depths"]
        return plan, draw(plan, *depths, title=f"{folder}, shortcuts of {facts['base']}")
    if not (Path(folder) / "config.json").is_file():
        raise UserError(
            f"{folder} holds no config.json, so it is not a saved model; give the folder that"
            " holds one"
        )
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder)
    plan, patches = config.get_plan(), getattr(config, "num_patches", None)
    return plan, draw(
        plan, config.vision_depth, config.language_depth, num_patches=patches, title=folder
    )


def _near_depths(what: str) -> tuple[int | None, int | None]:
    """Depths of a recipe's two models, where these are on this machine; None for others."""
    path = Path(what)
    if path.suffix not in FILES or not path.is_file():
        return None, None
    plain = read_yaml(path.read_text(encoding="utf-8"), what)
    if not isinstance(plain, dict) or "stages" not in plain:
        return None, None
    model = parse_recipe(plain, name=what).model
    return _depth(model.vision, "vision"), _depth(model.language, "language")


def _depth(source: str | None, part: str) -> int | None:
    if source is None:
        return None
    folder = SHAPES_FOLDER / part if source == "shapes" else expand_path(source)
    if not (Path(folder) / "config.json").is_file():
        return None
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder)
    return getattr(config, f"{part}_config", config).get_text_config().num_hidden_layers
