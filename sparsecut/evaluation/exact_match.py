"""Judge answers, and give fractions of right answers with their uncertainty."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

from ..drawing import text_table
from .intervals import estimate_interval, list_images
from .intervals import wilson_interval as wilson_interval


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
        records: Lines of predictions.jsonl, of which `correct`, `group`, `level` and `images` are
            read.

    Returns:
        The keys of `compute_accuracy` over all records; `groups` and `levels`, the same by name;
        and `mean_over_levels`, the unweighted mean, or None where no record has a level.
    """
    scores = _score_records(records)
    for key in ("group", "level"):
        by_name: dict[str, list[dict]] = {}
        for record in records:
            if record[key] is not None:
                by_name.setdefault(record[key], []).append(record)
        scores[f"{key}s"] = {name: _score_records(by_name[name]) for name in sorted(by_name)}
    accuracies = [level["accuracy"] for level in scores["levels"].values()]
    scores["mean_over_levels"] = sum(accuracies) / len(accuracies) if accuracies else None
    return scores


def _score_records(records: Sequence[dict]) -> dict:
    return compute_accuracy([record["correct"] for record in records], list_images(records))


def compute_accuracy(correct: Sequence[bool], images: Sequence[Hashable] | None = None) -> dict:
    """The fraction of right answers (0 to 1), both counts, and its 95 % interval.

    Args:
        correct: Whether each answer is right.
        images: The image of each question. By default every question has its own.

    Returns:
        `accuracy`, `num_correct` and `num_examples`, and what `intervals.estimate_interval` gives.
    """
    num_correct = sum(correct)
    if images is None:
        images = range(len(correct))
    return {
        "accuracy": num_correct / len(correct),
        "num_correct": num_correct,
        "num_examples": len(correct),
        **estimate_interval(correct, images),
    }


def format_scores(result: dict) -> str:
    """The scores of an evaluation as a table of text, in per cent.

    The rows are all questions, then every level, every group, and the mean over levels.
    """
    medium = result.get("medium", "image")
    rows = [["", "accuracy", "right", "of", "95 % interval", "over"]]
    rows.append(_format_row("all", result, medium))
    for name, level in result["levels"].items():
        rows.append(_format_row(f"level {name}", level, medium))
    for name, group in result["groups"].items():
        rows.append(_format_row(f"group {name}", group, medium))
    mean = result["mean_over_levels"]
    if mean is not None:
        rows.append(["mean over levels", f"{100 * mean:.1f} %", "", "", "", ""])
    return text_table(rows, align="<>>>><")


def _format_row(name: str, scores: dict, medium: str) -> list[str]:
    low, high = scores["interval"]
    accuracy = f"{100 * scores['accuracy']:.1f} %"
    interval = f"{100 * low:.1f} to {100 * high:.1f}"
    counts = [str(scores["num_correct"]), str(scores["num_examples"])]
    return [name, accuracy, *counts, interval, describe_drawn(scores, medium)]


def describe_drawn(scores: dict, medium: str = "image") -> str:
    """What an interval is over: "600 images", where several questions share one, or "questions".

    Args:
        scores: What `intervals.estimate_interval` gave.
        medium: "image" or "audio".
    """
    if scores.get("interval_over") != "images":
        return "questions"
    return f"{scores['num_images']:,} {'recordings' if medium == 'audio' else 'images'}"
