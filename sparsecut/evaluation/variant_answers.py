"""The answers of one trained variant over seeds, in the form that `statistics` takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..schema import UserError

LEVEL_KEYS = {"levels": "level", "kinds": "group"}  # of a line of predictions.jsonl


@dataclass(frozen=True)
class Answers:
    """What one variant answered, over S seeds and I questions.

    Attributes:
        correct: Scores of the answers, [S, I], each 0 to 1.
        image: The image (or images) of every question, [I]; equal values are drawn together.
        level: The level of every question, [I]; None leaves a question out of all accuracies.
        ids: The id of every question, [I].
        seeds: The training seed of every row of `correct`, [S].

    Raises:
        UserError: Lengths differ, there are no answers, or a seed appears twice.
    """

    correct: np.ndarray
    image: Sequence
    level: Sequence
    ids: Sequence[str]
    seeds: Sequence[int]

    def __post_init__(self):
        num_seeds = len(self.seeds)
        num_questions = len(self.ids)
        shape = np.shape(self.correct)
        if shape != (num_seeds, num_questions) or 0 in shape:
            raise UserError(
                f"the answers have shape {shape}, but there are {num_seeds} seeds and"
                f" {num_questions} questions; give one row per seed and one column per question,"
                " at least one of each"
            )
        if not len(self.image) == len(self.level) == num_questions:
            raise UserError(
                f"there are {num_questions} questions, but {len(self.image)} images and"
                f" {len(self.level)} levels; give one of each per question"
            )
        if len(set(self.seeds)) < num_seeds:
            raise UserError(
                f"the seeds {list(self.seeds)} name one twice; give every run its own seed"
            )

    @classmethod
    def from_records(cls, runs: dict[int, list[dict]], average_over: str = "levels") -> Answers:
        """Read the lines of predictions.jsonl of one run for each seed.

        Without levels, all questions are of one level, "all". A question without an image is drawn
        by itself.

        Args:
            runs: The records by seed.
            average_over: What stands for levels: "levels", "kinds" (groups), or "questions" for
                one level of all.

        Raises:
            UserError: Two seeds answered different questions.
        """
        first_seed = next(iter(runs))
        first = runs[first_seed]
        ids = [record["id"] for record in first]
        correct = []
        for seed, records in runs.items():
            other_ids = [record["id"] for record in records]
            check_same_questions(ids, other_ids, f"seed {first_seed}", f"seed {seed}")
            correct.append([float(record["correct"]) for record in records])
        levels: list = [None] * len(first)
        if average_over in LEVEL_KEYS:
            levels = [record[LEVEL_KEYS[average_over]] for record in first]
        if all(level is None for level in levels):
            levels = ["all"] * len(levels)
        images = ["\n".join(record["images"]) or record["id"] for record in first]
        return cls(np.array(correct), images, levels, ids, list(runs))

    @property
    def levels(self) -> list[str]:
        """The levels' names, sorted."""
        return sorted({level for level in self.level if level is not None})

    @property
    def accuracies(self) -> np.ndarray:
        """Accuracy by seed and level, [S, L], with the levels in the order of `levels`."""
        level_names = np.array([str(name) for name in self.level])
        correct = np.asarray(self.correct)
        columns = [correct[:, level_names == name].mean(1) for name in self.levels]
        return np.stack(columns, axis=1)

    @property
    def mean_over_levels(self) -> float:
        """Accuracy averaged over levels, then seeds; see `exact_match.compute_scores`."""
        return float(self.accuracies.mean())


def check_same_questions(
    ids: Sequence[str], other_ids: Sequence[str], name: str, other_name: str
) -> None:
    """Refuse to compare answers to different questions."""
    if list(ids) == list(other_ids):
        return
    difference = f"{len(ids)} and {len(other_ids)} of them"
    if len(ids) == len(other_ids):
        number = 0
        while ids[number] == other_ids[number]:
            number += 1
        difference = f"number {number} is {ids[number]!r} and {other_ids[number]!r}"
    raise UserError(
        f"{name} and {other_name} answered different questions ({difference}); evaluate both on the"
        " same file in the same order"
    )
