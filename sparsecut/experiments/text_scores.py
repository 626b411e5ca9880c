"""Which questions their text answers, and how variants do on the others.

A question counts as answered by its text where the commonest answer to that text in training is
right, or where most runs without images answer it right. The others are open. A plain average hides
them where they are few.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from ..evaluation.statistics import estimate_accuracy, estimate_difference, pool_spread
from ..evaluation.variant_answers import Answers
from ..schema import read_json_file
from .text_baseline import TEXT_BASELINE

OPEN, GIVEN = "open", "given"


def find_answered(
    folder: Path, answers: dict[str, Answers], blind: Answers | None
) -> np.ndarray | None:
    """Find the questions that their text answers.

    Args:
        folder: The study's folder.
        answers: Variant to its answers under the main budget.
        blind: The answers of the runs without images, where there are any.

    Returns:
        Whether text alone answers a question, [I], or None where nothing is known of the texts.
    """
    if not answers:
        return None
    first = next(iter(answers.values()))
    commonest = _read_commonest(folder, first.ids)
    blind = _keep_same_questions(blind, first)
    if commonest is None and blind is None:
        return None
    answered = np.zeros(len(first.ids), dtype=bool)
    if commonest is not None:
        answered |= commonest
    if blind is not None:
        answered |= np.asarray(blind.correct).mean(0) > 0.5
    return answered


def label_parts(answered: np.ndarray) -> list[str]:
    """The part of every question, in place of its level."""
    return [GIVEN if is_answered else OPEN for is_answered in answered]


def score_texts(
    folder: Path,
    answers: dict[str, Answers],
    blind: Answers | None,
    answered: np.ndarray | None,
    baseline: str,
) -> dict | None:
    """Score the questions that text answers apart from the others.

    Args:
        folder: The study's folder.
        answers: Variant to its answers under the main budget.
        blind: The answers of the runs without images, where there are any.
        answered: What `find_answered` returns.
        baseline: The variant that the others are compared with.

    Returns:
        Plain values, as report.json holds them, or None where nothing is known of the texts.
    """
    if answered is None:
        return None
    first = next(iter(answers.values()))
    commonest = _read_commonest(folder, first.ids)
    blind = _keep_same_questions(blind, first)
    result: dict = {"commonest": None, "text_only": None}
    if commonest is not None:
        alone = replace(first, correct=commonest[None].astype(float), seeds=[0])
        result["commonest"] = _describe_scores(alone)
    if blind is not None:
        seen = replace(blind, image=first.image)  # drawn together where variants' are
        result["text_only"] = {**_describe_scores(seen), "seeds": list(blind.seeds)}

    result["num_open"] = int((~answered).sum())
    result["answered"] = float(answered.mean())
    result["arms"] = _score_variants(answers, answered, baseline)
    return result


def get_open_scores(text: dict) -> dict[str, float]:
    """Variant to its accuracy on the questions that text does not answer, of `score_texts`."""
    return {name: parts[OPEN]["value"] for name, parts in text["arms"].items() if OPEN in parts}


def _keep_same_questions(blind: Answers | None, first: Answers) -> Answers | None:
    """The runs without images, unless they answered other questions."""
    return blind if blind is not None and list(blind.ids) == list(first.ids) else None


def _read_commonest(folder: Path, ids: Sequence[str]) -> np.ndarray | None:
    """Which questions the commonest answer to their text answers right; None where not known."""
    path = folder / TEXT_BASELINE
    if not path.is_file():
        return None
    stored = read_json_file(path)
    if stored.get("ids") != list(ids):
        return None
    return np.array(stored["correct"], dtype=bool)


def _describe_scores(answers: Answers) -> dict:
    """The average, every level, and the share of all questions."""
    estimates = estimate_accuracy(answers)
    return {
        "average": asdict(estimates.average),
        "levels": {name: asdict(estimate) for name, estimate in estimates.levels.items()},
        "questions": float(np.asarray(answers.correct).mean()),
    }


def _score_variants(answers: dict[str, Answers], answered: np.ndarray, baseline: str) -> dict:
    """Accuracies on both parts by variant, and differences from the baseline on open questions."""
    labels = label_parts(answered)
    divided = {name: replace(one, level=labels) for name, one in answers.items()}
    spread = pool_spread(divided)
    base = divided.get(baseline)
    others = []
    for name, one in divided.items():
        if base is not None and name != baseline and not set(one.seeds).isdisjoint(base.seeds):
            others.append(name)

    scores = {}
    for name, one in divided.items():
        levels = estimate_accuracy(one).levels
        scores[name] = {part: asdict(estimate) for part, estimate in levels.items()}
        if name in others and OPEN in levels:
            for key, comparisons in (("difference", 1), ("corrected", len(others))):
                gap = estimate_difference(one, base, comparisons=comparisons, spread=spread)
                scores[name][key] = asdict(gap.levels[OPEN])
    return scores
