"""A study: variants of fusion x seeds x training budgets on equal data, described by one file.

A study is frozen data, equal to its YAML, and knows nothing of torch. `get_recipe` gives the recipe
of every run. runner.py lists what a run leaves on disk, and the other files of the folder.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from ..config.overrides import override
from ..config.places import check_model_places, check_places
from ..config.recipe import Recipe, parse_recipe
from ..config.shipped import find_file
from ..config.yaml_io import dump_yaml, read_yaml_file, rename_key
from ..schema import (
    UserError,
    build_dataclass,
    check_type,
    check_types,
    make_tuples,
    nearest,
    write_text_file,
)

SET_ELSEWHERE = {  # keys of a recipe that a study sets -> where
    "fusion": "arms",
    "output": "the study's `output`",
    "seed": "seeds",
    "feature_cache": "the study itself",
    "states": "the study itself",  # the old name
}
FOLDER_NAME = r"[a-z0-9][a-z0-9_.-]*"


@dataclass(frozen=True)
class DrawnImages:
    """Images of the built-in shapes to draw for a study.

    Attributes:
        train: Number of images to train on.
        ask: Number of images to evaluate on.
        split: The split that is evaluated on; `dev` and `test` never overlap.
        train_questions: Questions about each image to train on.
        questions: Questions about each evaluated image.
        seed: Equal seeds give equal images.
        size: small or large.
    """

    train: int
    ask: int
    split: str = "test"
    train_questions: int = 12
    questions: int = 7
    seed: int = 0
    size: str = "small"

    def __post_init__(self):
        check_types(self)


@dataclass(frozen=True)
class Budget:
    """How long to train.

    Attributes:
        change: Overrides of the recipe, such as `stages.1.args.max_steps=720`.
        arms: The variants that have this budget; None for all.
        seeds: The seeds that have this budget; None for all.
    """

    change: tuple[str, ...] = ()
    arms: tuple[str, ...] | None = None
    seeds: tuple[int, ...] | None = None

    def __post_init__(self):
        for name in ("change", "arms", "seeds"):
            if getattr(self, name) is not None:
                make_tuples(self, name)
        check_types(self)

    def to_dict(self) -> dict:
        """Plain lists, numbers and strings: what YAML holds."""
        values = {"change": list(self.change)}
        if self.arms is not None:
            values["arms"] = list(self.arms)
        if self.seeds is not None:
            values["seeds"] = list(self.seeds)
        return values


@dataclass(frozen=True)
class Study:
    """What is compared, on what data, how often and how long.

    Attributes:
        title: The title of the report.
        recipe: A recipe's keys without fusion, output, seed and feature_cache, the same for every
            variant.
        arms: Name of a variant to its fusion: a method's name or a plan.
        output: The study's folder.
        baseline: The variant that the others are compared with.
        seeds: Every variant is trained with each seed.
        budgets: Name to overrides of the recipe, or to the keys of a `Budget`. The first is the
            main one.
        pictures: Images of the built-in shapes to draw; they replace the recipe's data.
        families: Variant to the name that reports group it by.
        feature_cache: Whether to cache a frozen encoder's features on disk.
        note: A sentence for the report.
    """

    title: str
    recipe: dict
    arms: dict[str, str | dict]
    output: str
    baseline: str
    seeds: tuple[int, ...] = (0,)
    budgets: dict[str, Budget] = field(default_factory=lambda: {"main": Budget()})
    pictures: DrawnImages | None = None
    families: dict[str, str] = field(default_factory=dict)
    feature_cache: bool = True
    note: str = ""

    def __post_init__(self):
        # Frozen data shares nothing with what it was made of.
        object.__setattr__(self, "recipe", copy.deepcopy(self.recipe))
        make_tuples(self, "seeds")
        check_type("budgets", self.budgets, dict)
        budgets = {name: _build_budget(name, values) for name, values in self.budgets.items()}
        object.__setattr__(self, "budgets", budgets)
        check_types(self)
        _check_folder_names("arms", self.arms)
        _check_folder_names("budgets", self.budgets)
        _check_seeds(self.seeds)
        self._check_variants("baseline", [self.baseline])
        self._check_variants("families", self.families)

        for name, budget in self.budgets.items():
            self._check_variants(f"budgets.{name}.arms", budget.arms or ())

        for key, place in SET_ELSEWHERE.items():
            if key in self.recipe:
                raise UserError(f"recipe.{key} is set by {place}; remove it there")

        for run in self.list_runs():
            self._check_recipe(run)

    def _check_variants(self, key: str, names: Collection[str]) -> None:
        for name in names:
            if name not in self.arms:
                raise UserError(
                    f"{key} names the variant {name!r}{nearest(name, self.arms)}, but the variants"
                    f" (arms) are {', '.join(self.arms)}"
                )

    def _check_recipe(self, run: Run) -> None:
        base = self.get_recipe(run).model.base
        if base:
            raise UserError(
                f"the recipe has model.base {base!r}, but a study compares plans of models that are"
                " built from an encoder and a language model; give model.vision and"
                " model.language, and train recipes with a base one by one"
            )

    @property
    def main(self) -> str:
        """The name of the main budget."""
        return next(iter(self.budgets))

    def list_runs(self) -> list[Run]:
        """Every run: the main budget first, then seed by seed, so that a part is balanced."""
        runs = []
        for name, budget in self.budgets.items():
            for seed in self.seeds:
                if budget.seeds is not None and seed not in budget.seeds:
                    continue
                for variant in self.arms:
                    if budget.arms is None or variant in budget.arms:
                        runs.append(Run(name, variant, seed))

        return runs

    def check_places(self) -> None:
        """Check that the models and the data are there, before anything slow is imported.

        Raises:
            UserError: Something is missing.
        """
        for name in self.budgets:
            recipe = self.get_recipe(Run(name, self.baseline, self.seeds[0]))
            if self.pictures is None:
                check_places(recipe)
            else:  # the data is drawn first
                check_model_places(recipe)

    def get_recipe(self, run: Run) -> Recipe:
        """Return the recipe of one run, its output inside the study's folder.

        Raises:
            UserError: The recipe is wrong.
        """
        folder = Path(self.output)
        values = dict(self.recipe)

        for change in [*self._list_data_changes(), *self.budgets[run.budget].change]:
            values = override(values, change)

        values["fusion"] = self.arms[run.variant]
        values["output"] = str(run.get_folder(folder))
        values["seed"] = run.seed
        trains_vision = any("vision" in str(stage.get("train")) for stage in self._list_stages())
        if self.feature_cache and not trains_vision:
            values["feature_cache"] = str(folder / "states")
        return parse_recipe(values, name=f"the study's recipe for {run.variant}")

    def _list_stages(self) -> list[dict]:
        """The recipe's stages; none where it has no list of them, which `parse_recipe` refuses."""
        stages = self.recipe.get("stages")
        if not isinstance(stages, list | tuple):
            return []
        return [stage for stage in stages if isinstance(stage, dict)]

    def _list_data_changes(self) -> list[str]:
        """Overrides that put the drawn images in place of the recipe's data."""
        if self.pictures is None:
            return []
        data = Path(self.output) / "data"
        changes = [
            f"evaluate.data.path={data / self.pictures.split}.json",
            f"evaluate.data.images={data}",
        ]

        for i, stage in enumerate(self._list_stages()):
            name = "train_captions" if stage.get("template") == "plain" else "train"
            changes.append(f"stages.{i}.data.path={data / name}.json")
            changes.append(f"stages.{i}.data.images={data}")

        return changes

    def to_dict(self) -> dict:
        """Plain lists, numbers and strings: what YAML holds."""
        values = asdict(self)
        values["seeds"] = list(self.seeds)
        values["main"] = self.main
        for name, budget in self.budgets.items():
            values["budgets"][name] = budget.to_dict()
        return values


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        budget: The budget's name.
        variant: The variant's name.
        seed: The seed of the recipe.
    """

    budget: str
    variant: str
    seed: int

    def __str__(self) -> str:
        return f"{self.budget}/{self.variant}/{self.seed}"

    def get_folder(self, out: str | Path) -> Path:
        """Where it leaves its files, inside the study's folder."""
        return Path(out) / "runs" / self.budget / self.variant / str(self.seed)

    def is_finished(self, out: str | Path) -> bool:
        """Whether it has been trained and evaluated."""
        folder = self.get_folder(out)
        return (folder / "eval" / "result.json").is_file() and (folder / "facts.json").is_file()


def _build_budget(name: str, values: Budget | dict | list | None) -> Budget:
    """A budget from keys and values, or from its overrides alone."""
    if isinstance(values, Budget):
        return values
    if not isinstance(values, dict):
        values = {"change": values or []}
    return build_dataclass(Budget, values, f"budgets.{name}")


def _check_folder_names(key: str, names: Collection) -> None:
    if not names:
        raise UserError(f"{key} is empty, but at least one is needed")
    for name in names:
        if not re.fullmatch(FOLDER_NAME, str(name)):
            raise UserError(
                f"{key} has the name {name!r}, but names become folders: use small letters, digits,"
                " -, _ and ."
            )


def _check_seeds(seeds: tuple) -> None:
    if not seeds:
        raise UserError(f"seeds is {list(seeds)}, but at least one whole number is needed")
    if len(set(seeds)) < len(seeds):
        raise UserError(
            f"seeds is {list(seeds)}, but each seed can be run once only; remove the repeated ones"
        )


def load_study(path: str | Path, overrides: Sequence[str] = ()) -> Study:
    """Read a study file.

    Args:
        path: A YAML file, or the name of a study that ships with the package, such as "shapes".
        overrides: Dotted changes, such as "seeds=[0,1]".

    Raises:
        UserError: There is no such study, or it is wrong.
    """
    values = read_yaml_file(find_file(path, "study"))
    for change in overrides:
        values = override(values, change)

    return parse_study(values, name=str(path))


def parse_study(values: dict, *, name: str = "study") -> Study:
    """Build a study from keys and values, as YAML holds them; errors start with `name`."""
    if isinstance(values, dict):
        values = {key: value for key, value in values.items() if key != "main"}
    values = rename_key(values, "states", "feature_cache", name)
    return build_dataclass(Study, values, name)


def narrow_study(study: Study, variants: Sequence[str] = (), seeds: Sequence[int] = ()) -> Study:
    """Return the study with some of its variants and seeds only; an empty list keeps all.

    Raises:
        UserError: The study has no such variant or seed.
    """
    _check_part("variant", variants, list(study.arms))
    _check_part("seed", seeds, study.seeds)

    chosen = [name for name in study.arms if not variants or name in variants]
    families = {name: study.families[name] for name in chosen if name in study.families}

    budgets = {}
    for name, budget in study.budgets.items():
        if budget.arms is not None:
            part = tuple(variant for variant in budget.arms if variant in chosen)
            budget = replace(budget, arms=part)
        budgets[name] = budget

    return replace(
        study,
        budgets=budgets,
        arms={name: study.arms[name] for name in chosen},
        baseline=study.baseline if study.baseline in chosen else chosen[0],
        families=families,
        seeds=tuple(seeds) or study.seeds,
    )


def _check_part(kind: str, names: Sequence, known: Sequence) -> None:
    for name in names:
        if name not in known:
            raise UserError(
                f"the study has no {kind} {name!r}{nearest(name, known)}; it has"
                f" {', '.join(map(str, known))}"
            )


def dump_study(study: Study, path: Path) -> None:
    """Write the study with everything that was decided, unless the file holds it already."""
    if not (path.is_file() and load_study(path) == study):
        write_text_file(path, dump_yaml(study.to_dict()))
