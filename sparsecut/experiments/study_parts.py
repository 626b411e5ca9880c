"""Parts of a study: images to draw, training budgets, questions, and single runs."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from ..schema import UserError, build_dataclass, check_types, make_tuples

FOLDER_NAME = r"[a-z0-9][a-z0-9_.-]*"
DIVERGED = "diverged.txt"  # of a dev run: its loss was not finite


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
class Question:
    """What a study asks, and the pairs of variants that answer it.

    Attributes:
        ask: The question, as reports print it.
        pairs: Pairs (variant, compared with). Intervals are corrected for all pairs and budgets of
            the question.
        budgets: Names of the budgets that are compared; None for the main one.
    """

    ask: str
    pairs: tuple[tuple[str, str], ...]
    budgets: tuple[str, ...] | None = None

    def __post_init__(self):
        make_tuples(self, "pairs")
        object.__setattr__(self, "pairs", tuple(_make_pair(pair) for pair in self.pairs))
        if self.budgets is not None:
            make_tuples(self, "budgets")
        check_types(self)
        if not self.pairs:
            raise UserError(
                f"the question {self.ask!r} has no pairs; give at least one, such as pairs:"
                " [[sparsecut, llava]]"
            )

    @property
    def variants(self) -> list[str]:
        """The variants that it names."""
        names = []
        for pair in self.pairs:
            names += pair
        return names

    def to_dict(self) -> dict:
        """Plain lists and strings: what YAML holds."""
        values: dict = {"ask": self.ask, "pairs": [list(pair) for pair in self.pairs]}
        if self.budgets is not None:
            values["budgets"] = list(self.budgets)
        return values


def _make_pair(pair: object) -> tuple[str, str]:
    if isinstance(pair, list | tuple) and len(pair) == 2 and pair[0] != pair[1]:
        return tuple(pair)
    raise UserError(
        f"a question's pair is {pair!r}, but it is two different variants, such as [sparsecut,"
        " llava]"
    )


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        budget: The budget's name.
        variant: The variant's name.
        seed: The seed of the recipe.
        rate: The fusion rate that a dev run tries; None for a run that reads the test split.
    """

    budget: str
    variant: str
    seed: int
    rate: float | None = None

    def __str__(self) -> str:
        if self.rate is None:
            return f"{self.budget}/{self.variant}/{self.seed}"
        return f"rates/{self.variant}/{self.rate:g}/{self.seed}"

    def get_folder(self, out: str | Path) -> Path:
        """Where it leaves its files, inside the study's folder."""
        if self.rate is not None:
            return Path(out) / "rates" / self.variant / f"{self.rate:g}" / str(self.seed)
        return Path(out) / "runs" / self.budget / self.variant / str(self.seed)

    def is_finished(self, out: str | Path) -> bool:
        """Whether it has been trained and evaluated, or its rate was too high to train at all."""
        folder = self.get_folder(out)
        if self.rate is not None and (folder / DIVERGED).is_file():
            return True
        return (folder / "eval" / "result.json").is_file() and (folder / "facts.json").is_file()


def build_budget(name: str, values: Budget | dict | list | None) -> Budget:
    """A budget from keys and values, or from its overrides alone."""
    if isinstance(values, Budget):
        return values
    if not isinstance(values, dict):
        values = {"change": values or []}
    return build_dataclass(Budget, values, f"budgets.{name}")


def build_question(name: str, values: Question | dict) -> Question:
    """A question from its keys."""
    if isinstance(values, Question):
        return values
    return build_dataclass(Question, values, f"questions.{name}")


def check_folder_names(key: str, names: Collection) -> None:
    """Check names that become folders."""
    if not names:
        raise UserError(f"{key} is empty, but at least one is needed")
    for name in names:
        if not re.fullmatch(FOLDER_NAME, str(name)):
            raise UserError(
                f"{key} has the name {name!r}, but names become folders: use small letters, digits,"
                " -, _ and ."
            )


def check_seeds(seeds: tuple) -> None:
    """Check that there are seeds, each one once."""
    if not seeds:
        raise UserError(f"seeds is {list(seeds)}, but at least one whole number is needed")
    if len(set(seeds)) < len(seeds):
        raise UserError(
            f"seeds is {list(seeds)}, but each seed can be run once only; remove the repeated ones"
        )
