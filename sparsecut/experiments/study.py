"""A study: ways of fusion (arms) x seeds x training budgets on equal data, described by one file.

A study is frozen data, equal to its YAML, and knows nothing of torch. `runs_of` gives the recipe of every run; what a run
leaves on disk, and the folder's other files, are told in study_runner.py.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import yaml

from ..config.recipe import Recipe, parse_recipe
from ..config.yaml_io import override, read_yaml
from ..schema import UserError, build_dataclass, nearest

OWN = {
    "fusion": "arms",
    "output": "the study's `output`",
    "seed": "seeds",
    "states": "the study itself",
}
SLUG = r"[a-z0-9][a-z0-9_.-]*"


@dataclass(frozen=True)
class WorldPictures:
    """Pictures of the built-in world to draw for a study: numbers of them, questions about each,
    and the seed.
    """

    train: int
    ask: int
    split: str = "test"
    train_questions: int = 12
    questions: int = 7
    seed: int = 0
    size: str = "small"


@dataclass(frozen=True)
class Budget:
    """How long is trained (change: overrides of the recipe), and for which arms and seeds; without
    a list, for all of them.
    """

    change: tuple[str, ...] = ()
    arms: tuple[str, ...] | None = None
    seeds: tuple[int, ...] | None = None

    def __post_init__(self):
        for name in ("change", "arms", "seeds"):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))


@dataclass(frozen=True)
class Study:
    """What is compared (arms: name -> fusion spec), on what (recipe, pictures), how often (seeds)
    and how long (budgets).

    recipe: a recipe's keys without fusion, output, seed and states, the same for every arm.
    budgets: name -> overrides of it, or {change: overrides, arms: some of them, seeds: some of
    them}; the first is the main one. pictures: pictures of the built-in world to draw, put in for
    the recipe's data. baseline: the arm that others are compared with. families: arm -> a word that
    reports group it by. states: keep the encoder's states on disk, where no stage trains it (false
    where pictures are too many). note: a sentence for the report.
    """

    title: str
    recipe: dict
    arms: dict[str, str | dict]
    output: str
    baseline: str
    seeds: tuple[int, ...] = (0,)
    budgets: dict[str, Budget] = field(default_factory=lambda: {"main": Budget()})
    pictures: WorldPictures | None = None
    families: dict[str, str] = field(default_factory=dict)
    states: bool = True
    note: str = ""

    def __post_init__(self):
        # Frozen data shares nothing with what it was made of.
        object.__setattr__(self, "recipe", copy.deepcopy(self.recipe))
        object.__setattr__(
            self,
            "seeds",
            tuple(self.seeds) if isinstance(self.seeds, list | tuple) else (self.seeds,),
        )
        budgets = {name: _build_budget(name, values) for name, values in self.budgets.items()}
        object.__setattr__(self, "budgets", budgets)
        for what, names in (("arm", self.arms), ("budget", self.budgets)):
            if not names or any(not re.fullmatch(SLUG, str(name)) for name in names):
                raise UserError(
                    f"{what}s are named {', '.join(map(str, names)) or 'nothing'}, but at least one"
                    " is needed and names become folders: use small letters, digits, -, _ and ."
                )
        if any(isinstance(s, bool) or not isinstance(s, int) for s in self.seeds) or not self.seeds:
            raise UserError(f"seeds is {list(self.seeds)}, but at least one whole number is needed")
        if len(set(self.seeds)) < len(self.seeds):
            raise UserError(
                f"seeds is {list(self.seeds)}, but each seed can be run once only; remove the"
                " repeated ones"
            )
        places = [("baseline", [self.baseline]), ("families", self.families)]
        places += [
            (f"budgets.{name}.arms", budget.arms or ()) for name, budget in self.budgets.items()
        ]
        for name, arms in places:
            for arm in arms:
                if arm not in self.arms:
                    raise UserError(
                        f"{name} names the arm {arm!r}{nearest(arm, self.arms)}, but the arms are"
                        f" {', '.join(self.arms)}"
                    )
        for key, place in OWN.items():
            if key in self.recipe:
                raise UserError(f"recipe.{key} is set by {place}; remove it there")
        for run in self.runs():
            if base := self.recipe_of(run).model.base:
                raise UserError(
                    f"the recipe starts from the base {base}, but a study's arms are plans of"
                    " models that are built from an encoder and a language model; give vision and"
                    " language, and train recipes with a base one by one"
                )

    @property
    def main(self) -> str:
        """The name of the main budget."""
        return next(iter(self.budgets))

    def runs(self) -> list[Run]:
        """Every run: the main budget first, then seed by seed, so that a part of a study is
        balanced.
        """
        found = []
        for name, budget in self.budgets.items():
            seeds = [s for s in self.seeds if budget.seeds is None or s in budget.seeds]
            arms = [a for a in self.arms if budget.arms is None or a in budget.arms]
            found += [Run(name, arm, seed) for seed in seeds for arm in arms]
        return found

    def recipe_of(self, run: Run) -> Recipe:
        """The recipe of one run, its output inside the study's folder; ValueError for a wrong
        one.
        """
        out, plain = Path(self.output), dict(self.recipe)
        for change in self._data_changes(plain) + list(self.budgets[run.budget].change):
            plain = override(plain, change)
        plain |= {"fusion": self.arms[run.arm], "output": str(run.folder(out)), "seed": run.seed}
        if self.states and all(
            "vision" not in stage.get("train", ()) for stage in plain.get("stages", ())
        ):
            plain["states"] = str(out / "states")
        return parse_recipe(plain, name=f"the study's recipe for {run.arm}")

    def _data_changes(self, plain: dict) -> list[str]:
        if self.pictures is None:
            return []
        data = Path(self.output) / "data"
        changes = [
            f"evaluate.data.path={data / self.pictures.split}.json",
            f"evaluate.data.images={data}",
        ]
        for i, stage in enumerate(plain.get("stages", ())):
            name = "train_captions" if stage.get("template") == "plain" else "train"
            changes += [
                f"stages.{i}.data.path={data / name}.json",
                f"stages.{i}.data.images={data}",
            ]
        return changes

    def to_dict(self) -> dict:
        """Plain lists, numbers and strings: what YAML holds."""
        budgets = {}
        for name, b in self.budgets.items():
            given = {"arms": b.arms, "seeds": b.seeds}
            budgets[name] = {"change": list(b.change)} | {
                k: list(v) for k, v in given.items() if v is not None
            }
        return {**asdict(self), "seeds": list(self.seeds), "budgets": budgets, "main": self.main}


@dataclass(frozen=True)
class Run:
    """One training: an arm with a seed under a budget."""

    budget: str
    arm: str
    seed: int

    def folder(self, out: Path) -> Path:
        """Where it leaves its files."""
        return Path(out) / "runs" / self.budget / self.arm / str(self.seed)

    def finished(self, out: Path) -> bool:
        """Whether it has been trained and evaluated."""
        return (self.folder(out) / "eval" / "result.json").is_file() and (
            self.folder(out) / "facts.json"
        ).is_file()


def _build_budget(name: str, values: Budget | dict | list | None) -> Budget:
    """A budget from keys and values, or from its overrides alone."""
    if isinstance(values, Budget):
        return values
    if not isinstance(values, dict):
        values = {"change": values or []}
    return build_dataclass(Budget, values, f"budgets.{name}")


def load_study(path: str | Path, overrides: Sequence[str] = ()) -> Study:
    """Read a study file and change it by dotted overrides such as "seeds=[0,1]"; ValueError if
    wrong.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(
            f"there is no study {path}; give a YAML file such as configs/study/shapes.yaml"
        )
    plain = read_yaml(path.read_text(encoding="utf-8"), str(path))
    for change in overrides:
        plain = override(plain, change)
    return parse_study(plain, name=str(path))


def parse_study(plain: dict, *, name: str = "study") -> Study:
    """A study from plain keys and values, as YAML holds them; errors start with `name`."""
    if isinstance(plain, dict):
        plain = {key: value for key, value in plain.items() if key != "main"}
    return build_dataclass(Study, plain, name)


def narrowed(study: Study, arms: Sequence[str] = (), seeds: Sequence[int] = ()) -> Study:
    """The study with some of its arms and seeds only; ValueError for one that it does not have."""
    for what, asked, known in (("arm", arms, list(study.arms)), ("seed", seeds, list(study.seeds))):
        for one in asked:
            if one not in known:
                raise UserError(
                    f"the study has no {what} {one!r}{nearest(one, map(str, known))}; it has"
                    f" {', '.join(map(str, known))}"
                )
    kept = [arm for arm in study.arms if not arms or arm in arms]
    baseline = study.baseline if study.baseline in kept else kept[0]
    families = {arm: word for arm, word in study.families.items() if arm in kept}
    chosen = {arm: study.arms[arm] for arm in kept}
    budgets = {
        name: replace(b, arms=b.arms and tuple(arm for arm in b.arms if arm in kept))
        for name, b in study.budgets.items()
    }
    return replace(
        study,
        budgets=budgets,
        arms=chosen,
        baseline=baseline,
        families=families,
        seeds=tuple(seeds) or study.seeds,
    )


def dump_study(study: Study, path: Path) -> None:
    """Write the study with everything that was decided."""
    path.write_text(
        yaml.safe_dump(study.to_dict(), sort_keys=False, allow_unicode=True, width=110),
        encoding="utf-8",
    )
