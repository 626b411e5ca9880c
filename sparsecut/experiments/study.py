"""A study: variants of fusion x seeds x training budgets on equal data, described by one file.

A study is frozen data, equal to its YAML, and knows nothing of torch. `get_recipe` gives the recipe
of every run. runner.py lists what a run leaves on disk, and the other files of the folder.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from ..config.mistaken_files import read_settings_file
from ..config.overrides import override
from ..config.places import check_model_places, check_places
from ..config.recipe import Recipe, parse_recipe
from ..config.shipped import find_file
from ..config.yaml_io import dump_yaml, rename_key, to_lists
from ..schema import (
    UserError,
    build_dataclass,
    check_choice,
    check_type,
    check_types,
    make_tuples,
    nearest,
    write_text_file,
)
from .rates import (
    TEXT_ONLY,
    Rates,
    Variant,
    build_variant,
    drop_images,
    set_rate,
    take_dev_part,
    trains_language,
)
from .study_parts import (
    Budget,
    DrawnImages,
    Question,
    Run,
    build_budget,
    build_question,
    check_folder_names,
    check_seeds,
)

AVERAGES = ("levels", "kinds", "questions")
SET_ELSEWHERE = {  # keys of a recipe that a study sets -> where
    "fusion": "arms",
    "output": "the study's `output`",
    "seed": "seeds",
    "feature_cache": "the study itself",
    "states": "the study itself",  # the old name
}


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
        rates: How each variant's fusion rate is chosen; None takes the recipe's own.
        text_only: Whether the same training without images is a baseline. None means yes where
            rates are chosen and language is trained.
        average_over: What the average is over, "levels", "kinds" (groups of questions) or
            "questions".
        questions: Name to what is asked and the pairs of variants that answer it, as `Question`
            or its keys; a table of the report each.
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
    rates: Rates | None = None
    text_only: bool | None = None
    average_over: str = "levels"
    questions: dict[str, Question] = field(default_factory=dict)

    def __post_init__(self):
        # Frozen data shares nothing with what it was made of.
        object.__setattr__(self, "recipe", copy.deepcopy(self.recipe))
        make_tuples(self, "seeds")
        check_type("budgets", self.budgets, dict)
        budgets = {name: build_budget(name, values) for name, values in self.budgets.items()}
        object.__setattr__(self, "budgets", budgets)
        check_type("questions", self.questions, dict)
        questions = {name: build_question(name, one) for name, one in self.questions.items()}
        object.__setattr__(self, "questions", questions)
        check_types(self)
        check_choice("average_over", self.average_over, AVERAGES)
        check_folder_names("arms", self.arms)
        check_folder_names("budgets", self.budgets)
        check_seeds(self.seeds)
        self._check_variants("baseline", [self.baseline])
        self._check_variants("families", self.families)

        for name, budget in self.budgets.items():
            self._check_variants(f"budgets.{name}.arms", budget.arms or ())
        for name, question in self.questions.items():
            self._check_question(f"questions.{name}", question)

        for key, place in SET_ELSEWHERE.items():
            if key in self.recipe:
                raise UserError(f"recipe.{key} is set by {place}; remove it there")

        self._check_rates()
        checked: set[tuple] = set()
        for run in self.list_runs():
            kind = (run.budget, run.variant, run.rate is None)
            facts = {kind, ("seed", run.seed), ("rate", run.rate)}
            if not facts <= checked:  # one run of each kind, with each seed and rate, is enough
                self._check_recipe(run)
                checked |= facts

    def _check_rates(self) -> None:
        """Check what belongs to choosing rates, and to the run without images."""
        for name, variant in self.variants.items():
            if self.rates is None and variant.rate_factor != 1:
                raise UserError(
                    f"arms.{name}.rate_factor is {variant.rate_factor:g}, but no rates are chosen;"
                    " add rates, or remove it"
                )
        if TEXT_ONLY in self.arms:
            raise UserError(
                f"arms has {TEXT_ONLY!r}, which names the same training without images; give the"
                " variant another name, and set text_only: true for that baseline"
            )
        if self.text_only and not trains_language(self._list_stages()):
            raise UserError(
                "text_only is true, but no stage trains language, so that without images nothing is"
                " trained; remove it: reports have the commonest answer to each question's text"
            )
        if self.rates is None:
            return
        both = sorted(set(self.seeds) & set(self.rates.seeds))
        if both:
            raise UserError(
                f"seeds {both} are in seeds and in rates.seeds, but the test split is read with"
                " seeds that no rate was chosen with; use others, such as rates: {seeds: [100,"
                " 101]}"
            )
        if not any("fusion" in str(stage.get("train")) for stage in self._list_stages()):
            raise UserError("rates are chosen, but no stage trains fusion; remove rates")

    def _check_variants(self, key: str, names: Collection[str]) -> None:
        for name in names:
            if name not in self.arms:
                raise UserError(
                    f"{key} names the variant {name!r}{nearest(name, self.arms)}, but the variants"
                    f" (arms) are {', '.join(self.arms)}"
                )

    def _check_question(self, key: str, question: Question) -> None:
        """Check that a question's variants are trained under its budgets."""
        self._check_variants(f"{key}.pairs", question.variants)
        for name in question.budgets or ():
            if name not in self.budgets:
                raise UserError(
                    f"{key}.budgets names {name!r}{nearest(name, self.budgets)}, but the study has"
                    f" {', '.join(self.budgets)}; name one of them, or leave the questions out with"
                    " questions={}"
                )
            trained = self.budgets[name].arms
            for variant in question.variants:
                if trained is not None and variant not in trained:
                    raise UserError(
                        f"{key} compares {variant!r} under the budget {name}, which trains only"
                        f" {', '.join(trained)}; add it to budgets.{name}.arms"
                    )

    def _check_recipe(self, run: Run) -> None:
        rate = None if self.rates is None else self.rates.default
        base = self.get_recipe(run, rate).model.base
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

    @property
    def variants(self) -> dict[str, Variant]:
        """The variants by name; of `text_only`, nothing."""
        return {name: self._get_variant(name) for name in self.arms}

    def _get_variant(self, name: str) -> Variant:
        return build_variant(name, self.arms[name])

    @property
    def has_text_only(self) -> bool:
        """Whether the same training without images is run."""
        if self.text_only is not None:
            return self.text_only
        return self.rates is not None and trains_language(self._list_stages())

    def get_fusion(self, name: str) -> str | dict:
        """A variant's fusion; that of `text_only` is the baseline's, which then has no images."""
        return self._get_variant(self.baseline if name == TEXT_ONLY else name).fusion

    def get_grid(self, name: str) -> tuple[float, ...]:
        """The rates that are tried for a variant; none where it needs no choice."""
        variant = None if name == TEXT_ONLY else self._get_variant(name)
        if self.rates is None or variant is None or variant.rate is not None:
            return ()
        return tuple(float(f"{rate * variant.rate_factor:.6g}") for rate in self.rates.grid)

    def list_runs(self) -> list[Run]:
        """Every run: those that choose rates, then the main budget, and the others.

        They come seed by seed, so that a part is balanced.
        """
        return [*self.list_dev_runs(), *self.list_test_runs()]

    def list_dev_runs(self) -> list[Run]:
        """The runs that choose the rates of variants that any budget trains."""
        trained = {run.variant for run in self.list_test_runs()}
        runs = []
        for seed in self.rates.seeds if self.rates else ():
            for variant in self.arms:
                if variant in trained:
                    rates = self.get_grid(variant)
                    runs += [Run(self.main, variant, seed, rate) for rate in rates]
        return runs

    def list_test_runs(self) -> list[Run]:
        """The runs whose answers are compared."""
        runs = []
        for name, budget in self.budgets.items():
            for seed in self.seeds:
                if budget.seeds is not None and seed not in budget.seeds:
                    continue
                for variant in self.arms:
                    if budget.arms is None or variant in budget.arms:
                        runs.append(Run(name, variant, seed))
                if self.has_text_only and name == self.main:
                    runs.append(Run(name, TEXT_ONLY, seed))

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

    def get_recipe(self, run: Run, rate: float | None = None) -> Recipe:
        """Return the recipe of one run, its output inside the study's folder.

        Args:
            run: The run.
            rate: The fusion rate of a run that reads the test split, where one was chosen.

        Raises:
            UserError: The recipe is wrong.
        """
        folder = Path(self.output)
        values = dict(self.recipe)

        changes = [*self._list_data_changes(run), *self.budgets[run.budget].change]
        if run.rate is not None:
            changes += self.rates.change
        if run.variant == TEXT_ONLY:
            rate = None
        else:
            variant = self._get_variant(run.variant)
            changes += variant.change
            rate = run.rate or variant.rate or rate
        for change in changes:
            values = override(values, change)

        values["fusion"] = self.get_fusion(run.variant)
        values["output"] = str(run.get_folder(folder))
        values["seed"] = run.seed
        trains_vision = any("vision" in str(stage.get("train")) for stage in self._list_stages())
        if self.feature_cache and not trains_vision:
            values["feature_cache"] = str(folder / "states")
        if len(self._list_stages()) == len(values.get("stages") or ()):
            values = self._adapt(values, run, rate)
        return parse_recipe(values, name=f"the study's recipe for {run.variant}")

    def _adapt(self, values: dict, run: Run, rate: float | None) -> dict:
        """A recipe's values with the run's fusion rate, and with the data that it may see."""
        if rate is not None:
            values = set_rate(values, rate)
        if run.rate is not None and self.pictures is None:
            values = take_dev_part(values, self.rates.dev)
        if run.variant == TEXT_ONLY:
            values = drop_images(values)
        return values

    def _list_stages(self) -> list[dict]:
        """The recipe's stages; none where it has no list of them, which `parse_recipe` refuses."""
        stages = self.recipe.get("stages")
        if not isinstance(stages, list | tuple):
            return []
        return [stage for stage in stages if isinstance(stage, dict)]

    def _list_data_changes(self, run: Run) -> list[str]:
        """Overrides that put the drawn images in place of the recipe's data."""
        if self.pictures is None:
            return []
        data = Path(self.output) / "data"
        asked = data / self.pictures.split if run.rate is None else data / "rates" / "dev"
        changes = [
            f"evaluate.data.path={asked}.json",
            f"evaluate.data.images={asked.parent}",
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
        if self.rates is not None:
            values["rates"] = to_lists(values["rates"])
        values["main"] = self.main
        for name, budget in self.budgets.items():
            values["budgets"][name] = budget.to_dict()
        for name, question in self.questions.items():
            values["questions"][name] = question.to_dict()
        return values


def load_study(path: str | Path, overrides: Sequence[str] = ()) -> Study:
    """Read a study file.

    Args:
        path: A YAML file, or the name of a study that ships with the package, such as "shapes".
        overrides: Dotted changes, such as "seeds=[0,1]".

    Raises:
        UserError: There is no such study, or it is wrong.
    """
    values = read_settings_file(find_file(path, "study"), "study")
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
    known = [*study.arms, *([TEXT_ONLY] if study.has_text_only else [])]
    _check_part("variant", variants, known)
    _check_part("seed", seeds, study.seeds)

    chosen = [name for name in study.arms if not variants or name in variants]
    arms = {name: study.arms[name] for name in chosen or study.arms}
    families = {name: study.families[name] for name in chosen if name in study.families}

    budgets = {}
    for name, budget in study.budgets.items():
        if budget.arms is not None or not chosen:
            part = tuple(variant for variant in budget.arms or () if variant in chosen)
            budget = replace(budget, arms=part)
        budgets[name] = budget

    return replace(
        study,
        budgets=budgets,
        questions={},  # reports ask them of the whole study
        arms=arms,
        baseline=study.baseline if study.baseline in arms else chosen[0],
        families=families,
        seeds=tuple(seeds) or study.seeds,
        text_only=study.has_text_only and (not variants or TEXT_ONLY in variants),
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
