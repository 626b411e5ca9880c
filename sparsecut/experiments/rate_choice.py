"""The fusion rate of each variant, chosen by what its dev runs left on disk.

A rate's score is the mean of its dev seeds, each the average that the study's report shows. The
best rate is chosen. Of equals, it is the one that is nearest to the default.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

from ..evaluation.output_dir import read_predictions
from ..evaluation.statistics import estimate_difference, pool_seed_spread
from ..evaluation.variant_answers import Answers
from ..schema import UserError
from .study import Study
from .study_parts import DIVERGED, Run

PREDICTIONS = Path("eval", "predictions.jsonl")


@dataclass
class RateChoice:
    """What the dev runs say of one variant.

    Attributes:
        variant: Its name.
        grid: Its rates, the lowest first.
        default: The rate of the grid that stands for the study's default.
        answers: Rate to the answers of its finished dev seeds.
        diverged: Rate to the seeds whose loss was not finite.
        num_missing: Dev runs that are not finished.
    """

    variant: str
    grid: tuple[float, ...]
    default: float
    answers: dict[float, Answers] = field(default_factory=dict)
    diverged: dict[float, list[int]] = field(default_factory=dict)
    num_missing: int = 0

    @property
    def scores(self) -> dict[float, float]:
        """Rate to its mean score, of those with a finished seed that trained with every seed."""
        scores = {}
        for rate, answers in self.answers.items():
            if rate not in self.diverged:
                scores[rate] = answers.mean_over_levels
        return scores

    @property
    def best(self) -> float | None:
        """The rate with the highest score so far; None where there is no score."""
        scores = self.scores
        if not scores:
            return None

        def rank(rate: float) -> tuple[float, float]:
            return scores[rate], -abs(math.log(rate / self.default))

        return max(scores, key=rank)

    @property
    def is_at_edge(self) -> bool:
        """Whether the best rate is the lowest or the highest that was tried."""
        return self.best in (self.grid[0], self.grid[-1])

    def describe(self) -> dict:
        """Plain values, as report.json holds them."""
        best = self.best
        cells = {}
        for rate in self.grid:
            answers = self.answers.get(rate)
            by_seed = {}
            if answers is not None:
                by_seed = dict(zip(answers.seeds, answers.accuracies.mean(1), strict=True))
            cells[f"{rate:g}"] = {
                "by_seed": {str(seed): float(score) for seed, score in by_seed.items()},
                "diverged": self.diverged.get(rate, []),
                "score": self.scores.get(rate),
            }
        return {
            "rate": best,
            "grid": list(self.grid),
            "default": self.default,
            "cells": cells,
            "missing": self.num_missing,
            "at_edge": best is not None and self.is_at_edge,
            "unclear": [] if best is None else self._list_unclear(best),
            "lost_at_default": None if best is None else self._get_loss(best),
        }

    def _get_loss(self, best: float) -> float | None:
        """How much lower the default's score is than the best."""
        scores = self.scores
        if self.default not in scores:
            return None
        return scores[best] - scores[self.default]

    def _list_unclear(self, best: float) -> list[float]:
        """Other rates that the dev runs cannot tell from the best one."""
        scored = [self.answers[rate] for rate in self.scores]
        spread = pool_seed_spread(scored)
        unclear = []
        for rate in self.scores:
            if rate == best:
                continue
            pair = self.answers[best], self.answers[rate]
            if set(pair[0].seeds).isdisjoint(pair[1].seeds):
                unclear.append(rate)  # of an unfinished study
            elif not estimate_difference(*pair, spread=spread).average.is_clear:
                unclear.append(rate)
        return unclear


def read_choice(study: Study, variant: str) -> RateChoice:
    """Read the dev runs of a variant, as far as they are finished."""
    out = Path(study.output)
    grid = study.get_grid(variant)
    default = grid[study.rates.grid.index(study.rates.default)]
    choice = RateChoice(variant, grid, default)
    for rate in grid:
        records = {}
        for seed in study.rates.seeds:
            run = Run(study.main, variant, seed, rate)
            folder = run.get_folder(out)
            if (folder / DIVERGED).is_file():
                choice.diverged.setdefault(rate, []).append(seed)
            elif run.is_finished(out):
                records[seed] = read_predictions(folder / PREDICTIONS, judged=True)
            else:
                choice.num_missing += 1
        if records:
            choice.answers[rate] = Answers.from_records(records, study.average_over)
    return choice


def find_rate(study: Study, variant: str) -> float | None:
    """Return the fusion rate of a variant's test runs; None where the recipe's own is meant.

    Raises:
        UserError: Its dev runs are not finished, or no rate of the grid trains it.
    """
    if not study.get_grid(variant):
        return None
    choice = read_choice(study, variant)
    if choice.num_missing:
        raise UserError(
            f"{choice.num_missing} dev runs of {variant} are not finished, so that its rate is not"
            " known; run the study without --seed and --variant first"
        )
    if choice.best is None:
        raise UserError(
            f"the loss of {variant} is not finite at any rate of the grid"
            f" ({', '.join(f'{rate:g}' for rate in choice.grid)}); add lower rates to rates.grid"
        )
    return choice.best
