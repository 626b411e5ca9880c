"""What right means, and how sure a share of right answers is."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

Z95 = 1.959964  # two-sided 95 % of the normal distribution


def normal(text: str) -> str:
    """What exact match compares: outer blanks, letter case and one full stop at the end do not
    count.
    """
    return text.strip().casefold().removesuffix(".").rstrip()


def exact_match(prediction: str, reference: str) -> bool:
    """Whether both are the same text after `normal`."""
    return normal(prediction) == normal(reference)


METRICS: dict[str, Callable[[str, str], bool]] = {"exact_match": exact_match}


def scores(records: Sequence[dict]) -> dict:
    """Shares of right answers over all records, by group, by level, and the mean over levels."""
    result = share([r["correct"] for r in records])
    for name in ("group", "level"):
        names = sorted({r[name] for r in records if r[name] is not None})
        result[f"{name}s"] = {
            n: share([r["correct"] for r in records if r[name] == n]) for n in names
        }
    levels = [level["accuracy"] for level in result["levels"].values()]
    return {**result, "mean_over_levels": sum(levels) / len(levels) if levels else None}


def share(right: Sequence[bool]) -> dict:
    """accuracy (0 to 1), num_correct, num_examples and the 95 % Wilson interval [low, high]."""
    correct = sum(right)
    return {
        "accuracy": correct / len(right),
        "num_correct": correct,
        "num_examples": len(right),
        "interval": wilson(correct, len(right)),
    }


def wilson(correct: int, total: int) -> list[float]:
    """The 95 % Wilson score interval of a share, [low, high]."""
    p, z2 = correct / total, Z95**2
    centre, scale = p + z2 / (2 * total), 1 + z2 / total
    half = Z95 * math.sqrt(p * (1 - p) / total + z2 / (4 * total**2))
    low, high = (centre - half) / scale, (centre + half) / scale
    return [
        low if correct else 0.0,
        high if correct < total else 1.0,
    ]  # exact where rounding would not be


def table(result: dict) -> str:
    """A result as lines of text: overall, then levels, then groups, in per cent with counts and
    intervals.
    """
    rows = [("all", result)]
    rows += [(f"level {name}", row) for name, row in result["levels"].items()]
    rows += [(f"group {name}", row) for name, row in result["groups"].items()]
    width = max(len("mean over levels"), *(len(name) for name, _ in rows))
    lines = [f"{'':{width}}  accuracy   right /    of    95 % interval"]
    for name, row in rows:
        low, high = (100 * bound for bound in row["interval"])
        lines.append(
            f"{name:{width}}   {100 * row['accuracy']:5.1f} %  {row['num_correct']:6}"
            f" /{row['num_examples']:6}    {low:.1f} to {high:.1f}"
        )
    if result["mean_over_levels"] is not None:
        lines.append(f"{'mean over levels':{width}}   {100 * result['mean_over_levels']:5.1f} %")
    return "\n".join(lines)
