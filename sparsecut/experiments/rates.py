"""How a study chooses the fusion rate of each variant: a grid, tried on a dev part of training.

The fusion rate is the learning rate `lr.fusion` of every stage that trains fusion, also where the
recipe leaves it to `args.learning_rate`. Everything here works on keys and values, without torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..config.recipe import ADAPTERS, PARTS
from ..schema import UserError, build_dataclass, check_types, make_tuples

FUSION = "fusion"
TEXT_ONLY = "text_only"  # the variant that sees no images
LANGUAGE_PARTS = ("language", "head")
DEFAULT_RATE = 3e-4
LEAST_SEEDS = 2  # of dev: one alone has misled by more than what was looked for


@dataclass(frozen=True)
class Rates:
    """How fusion rates are chosen.

    Attributes:
        grid: The rates that are tried, for every variant.
        default: The rate of the grid that the report compares the chosen ones with.
        seeds: Seeds of the dev runs; no seed of the test runs is among them.
        dev: About this fraction of the training images is the dev part, cut by image. With drawn
            images, so many further ones of the split dev are drawn.
        change: Overrides of the recipe in dev runs, such as fewer steps.
    """

    grid: tuple[float, ...] = (1e-4, DEFAULT_RATE, 1e-3)
    default: float = DEFAULT_RATE
    seeds: tuple[int, ...] = (100, 101)
    dev: float = 0.2
    change: tuple[str, ...] = ()

    def __post_init__(self):
        make_tuples(self, "grid", "seeds", "change")
        check_types(self)
        grid = tuple(sorted(self.grid))
        object.__setattr__(self, "grid", grid)
        if len(set(grid)) < len(grid) or len(grid) < 2 or grid[0] <= 0:
            raise UserError(
                f"grid is {list(self.grid)}, but at least two different rates above 0 are needed,"
                " such as [1e-4, 3e-4, 1e-3]"
            )
        if self.default not in grid:
            raise UserError(
                f"default is {self.default:g}, but must be one of the grid, which is"
                f" {format_rates(grid)}"
            )
        if len(set(self.seeds)) < max(len(self.seeds), LEAST_SEEDS):
            raise UserError(
                f"seeds is {list(self.seeds)}, but a rate is chosen by at least {LEAST_SEEDS}"
                " different seeds: one alone misleads"
            )
        if not 0 < self.dev < 1:
            raise UserError(f"dev is {self.dev}, but a fraction of the images lies between 0 and 1")


@dataclass(frozen=True)
class Variant:
    """What makes one variant of a study.

    Attributes:
        fusion: A method's name, a method with options, or a plan in full.
        change: Overrides of the recipe for this variant, such as more warm-up steps. They may not
            change what it reads.
        rate: Its fusion rate, where it is not chosen.
        rate_factor: The rates of the grid are multiplied by it, for example for a wider input.
    """

    fusion: str | dict
    change: tuple[str, ...] = ()
    rate: float | None = None
    rate_factor: float = 1.0

    def __post_init__(self):
        make_tuples(self, "change")
        check_types(self)
        for name in ("rate", "rate_factor"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise UserError(f"{name} is {value}, but must be above 0")
        if self.rate is not None and self.rate_factor != 1:
            raise UserError(
                f"rate is {self.rate:g} and rate_factor is {self.rate_factor:g}, but a rate that is"
                " given is not multiplied; remove one of them"
            )
        for change in self.change:
            _check_change(change)


def _check_change(change: str) -> None:
    """Refuse an override that would give a variant other data, or another model."""
    place = change.partition("=")[0].split(".")
    if place[0] != "stages" or "data" in place:
        raise UserError(
            f"change has {change!r}, but variants are compared on equal data and models: change"
            " settings of stages only, such as stages.0.args.warmup_steps=100"
        )


def build_variant(name: str, spec: str | dict) -> Variant:
    """A variant from what a study file says of it: its fusion alone, or the keys of `Variant`."""
    if isinstance(spec, dict) and FUSION in spec:
        return build_dataclass(Variant, spec, f"arms.{name}")
    return Variant(spec)


def format_rates(rates) -> str:
    """Rates as people write them: 0.0001, 0.0003."""
    return ", ".join(f"{rate:g}" for rate in rates)


def set_rate(values: dict, rate: float) -> dict:
    """A recipe's values with this fusion rate in every stage that trains fusion."""
    stages = []
    for stage in values["stages"]:
        if isinstance(stage, dict) and FUSION in _get_parts(stage):
            stage = {**stage, "lr": {**(stage.get("lr") or {}), FUSION: rate}}
        stages.append(stage)
    return {**values, "stages": stages}


def take_dev_part(values: dict, fraction: float) -> dict:
    """A recipe's values that train on one side of the images and ask about the other.

    The questions are those of the last stage.
    """
    stages = []
    for stage in values["stages"]:
        stages.append({**stage, "data": _change_sources(stage, dev=fraction, side="train")})
    asked = _change_sources(values["stages"][-1], dev=fraction, side="dev")
    asked = [{**source, "weight": None} for source in asked if isinstance(source, dict)]
    evaluate = {**(values.get("evaluate") or {}), "data": asked}
    return {**values, "stages": stages, "evaluate": evaluate}


def drop_images(values: dict) -> dict:
    """A recipe's values of the same training without images.

    Fusion has nothing to learn from then. Stages that train nothing else are left out.
    """
    stages = []
    for stage in values["stages"]:
        parts = [part for part in _get_parts(stage) if _is_language(part)]
        if not parts:
            continue
        stage = {**stage, "train": parts, "data": _change_sources(stage, text_only=True)}
        for key in ("lr", "weight_decay"):
            by_part = stage.get(key) or {}
            kept = {part: value for part, value in by_part.items() if _is_language(part)}
            if key in stage:
                stage[key] = kept
        stages.append(stage)
    asked = _change_sources(values.get("evaluate") or {}, text_only=True)
    evaluate = {**(values.get("evaluate") or {}), "data": asked}
    return {**values, "stages": stages, "evaluate": evaluate}


def trains_language(stages: Sequence[dict]) -> bool:
    """Whether anything is trained that could answer without images."""
    return any(_is_language(part) for stage in stages for part in _get_parts(stage))


def _is_language(part: str) -> bool:
    return part.partition(":")[0] in LANGUAGE_PARTS


def _get_parts(stage: dict) -> list[str]:
    """The parts that a stage trains, as far as they are known."""
    parts = stage.get("train") or []
    parts = [parts] if isinstance(parts, str) else parts
    return [part for part in parts if part in (*PARTS, *ADAPTERS)]


def _change_sources(holder: dict, **changes) -> list[dict]:
    """The sources of a stage or an evaluation, with some keys replaced."""
    sources = holder.get("data") or []
    sources = sources if isinstance(sources, list) else [sources]
    # What is no source stays as it is, and is refused where the recipe is read.
    return [{**source, **changes} if isinstance(source, dict) else source for source in sources]
