"""Judge answers, and give fractions of right answers with their uncertainty."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from ..drawing import text_table

Z95 = 1.959964  # two-sided 95 % quantile of the normal distribution


def normalize(text: str) -> str:
    """The text that exact match compares: no outer whitespace, case, or one final full stop."""
    return text.strip().casefold().removesuffix(".").rstrip()


def exact_match(prediction: str, reference: str) -> bool:
    """Whether both texts are the same after `normalize`."""
    return normalize(prediction) == normalize(reference)


METRICS: dict[str, Callable[[str, str], bool]] = {"exact_match": exact_match}


def compute_scores(records: Sequence[dict]) -> dict:
    """Accuracy over all records, by group and by level.

    Args:
        records: Lines of predictions.jsonl, of which `correct`, `group` and `level` are read.

    Returns:
        The keys of `compute_accuracy` over all records; `groups` and `levels`, the same by name;
        and `mean_over_levels`, the unweighted mean, or None where no record has a level.
    """
    scores = compute_accuracy([record["correct"] for record in records])
    for key in ("group", "level"):
        by_name: dict[str, list[bool]] = {}
        for record in records:
            if record[key] is not None:
                by_name.setdefault(record[key], []).append(record["correct"])
        scores[f"{key}s"] = {name: compute_accuracy(by_name[name]) for name in sorted(by_name)}
    accuracies = [level["accuracy"] for level in scores["levels"].values()]
    scores["mean_over_levels"] = sum(accuracies) / len(accuracies) if accuracies else None
    return scores


def compute_accuracy(correct: Sequence[bool]) -> dict:
    """The fraction of right answers (0 to 1), both counts, and the 95 % Wilson interval."""
    num_correct = sum(correct)
    return {
        "accuracy": num_correct / len(correct),
        "num_correct": num_correct,
        "num_examples": len(correct),
        "interval": wilson_interval(num_correct, len(correct)),
    }


def wilson_interval(num_correct: int, total: int) -> list[float]:
    """The 95 % score interval of a fraction (Wilson, 1927).

    Returns:
        [low, high], exactly 0 and 1 where no answer or every answer is right.
    """
    fraction = num_correct / total
    z_squared = Z95**2
    center = fraction + z_squared / (2 * total)
    scale = 1 + z_squared / total
    variance = fraction * (1 - fraction) / total + z_squared / (4 * total**2)
    half_width = Z95 * math.sqrt(variance)
    low = (center - half_width) / scale if num_correct else 0.0
    high = (center + half_width) / scale if num_correct < total else 1.0
    return [low, high]


def format_scores(result: dict) -> str:
    """The scores of an evaluation as a table of text, in per cent.

    The rows are all questions, then every level, every group, and the mean over levels.
    """
    rows = [["", "accuracy", "right", "of", "95 % interval"], _format_row("all", result)]
    for name, level in result["levels"].items():
        rows.append(_format_row(f"level {name}", level))
    for name, group in result["groups"].items():
        rows.append(_format_row(f"group {name}", group))
    mean = result["mean_over_levels"]
    if mean is not None:
        rows.append(["mean over levels", f"{100 * mean:.1f} %", "", "", ""])
    return text_table(rows, align="<>>>>")


def _format_row(name: str, scores: dict) -> list[str]:
    low, high = scores["interval"]
    accuracy = f"{100 * scores['accuracy']:.1f} %"
    interval = f"{100 * low:.1f} to {100 * high:.1f}"
    return [name, accuracy, str(scores["num_correct"]), str(scores["num_examples"]), interval]
