"""Answers to a study's questions: differences of pairs of variants, with intervals."""

from __future__ import annotations

from dataclasses import asdict, replace

import numpy as np

from ..evaluation.statistics import estimate_difference, pool_spread
from ..evaluation.variant_answers import Answers
from .study_parts import Question
from .text_scores import OPEN, label_parts

AnswersByBudget = dict[str, dict[str, Answers]]  # budget -> variant -> answers


def answer_questions(
    questions: dict[str, Question],
    answers: AnswersByBudget,
    main: str,
    answered: np.ndarray | None,
) -> dict[str, dict]:
    """Compare every question's pairs, as far as their runs are finished.

    Args:
        questions: The questions by name.
        answers: What every variant answered, by budget.
        main: The main budget.
        answered: Which evaluated questions text alone answers, [I]; None where that is not known.

    Returns:
        Name to `ask`, `comparisons` (pairs times budgets) and `rows`. A row has `pair`, `budget`,
        `seeds`, `average` and, where texts are known, `open`: estimates of the difference in
        fractions, with intervals corrected for all comparisons of the question.
    """
    result = {}
    for name, question in questions.items():
        budgets = question.budgets or (main,)
        comparisons = len(question.pairs) * len(budgets)
        rows = []
        for budget in budgets:
            known = answered if _have_same_questions(answers, main, budget) else None
            rows += _compare(question, budget, answers.get(budget, {}), comparisons, known)
        result[name] = {"ask": question.ask, "comparisons": comparisons, "rows": rows}
    return result


def _have_same_questions(answers: AnswersByBudget, main: str, budget: str) -> bool:
    """Whether a budget's variants were asked what those of the main budget were."""
    asked = []
    for name in (main, budget):
        asked += [list(one.ids) for one in answers.get(name, {}).values()]
    return all(ids == asked[0] for ids in asked)


def _compare(
    question: Question,
    budget: str,
    answers: dict[str, Answers],
    comparisons: int,
    answered: np.ndarray | None,
) -> list[dict]:
    """The differences of a question's pairs under one budget."""
    parts = {"average": answers}
    if answered is not None:
        labels = label_parts(answered)
        parts[OPEN] = {name: replace(one, level=labels) for name, one in answers.items()}
    spreads = {part: pool_spread(by) for part, by in parts.items()}

    rows = []
    for first, second in question.pairs:
        if first not in answers or second not in answers:
            continue
        seeds = [seed for seed in answers[first].seeds if seed in answers[second].seeds]
        if not seeds:
            continue
        row: dict = {"pair": [first, second], "budget": budget, "seeds": seeds}
        for part, by_variant in parts.items():
            gap = estimate_difference(
                by_variant[first],
                by_variant[second],
                comparisons=comparisons,
                spread=spreads[part],
            )
            estimate = gap.levels.get(OPEN) if part == OPEN else gap.average
            row[part] = asdict(estimate) if estimate else None
        rows.append(row)
    return rows
