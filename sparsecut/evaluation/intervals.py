"""95 % intervals of one evaluation: over images where questions share them, else over questions.

Answers about one image are alike, so many questions about few images say less than as many images
would. The interval is then as wide as that of independent questions whose number, the effective
one, gives the same variance between images (Kish, 1965; Korn and Graubard, 1998). It needs no
draws, and holds where every answer is right.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

Z95 = 1.959964  # two-sided 95 % quantile of the normal distribution
STUDENT_95 = {1: 12.7062, 2: 4.30265}  # of Student's t, where the series below is not exact enough


def wilson_interval(num_correct: float, total: float) -> list[float]:
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


def list_images(records: Sequence[dict]) -> list[Hashable]:
    """Return the image of every record, or its images together; what has none is its own.

    Args:
        records: Lines of predictions.jsonl, of which `images` is read where it is there.
    """
    images: list[Hashable] = []
    for number, record in enumerate(records):
        names = record.get("images")
        images.append("\n".join(names) if names else number)
    return images


def estimate_interval(values: Sequence[float], images: Sequence[Hashable]) -> dict:
    """The 95 % interval of a mean score.

    Args:
        values: The score of every question, 0 to 1.
        images: The image of every question; equal values are one image.

    Returns:
        `interval` [low, high]; `interval_over`, "images" where several questions share one of
        several images, else "questions"; and `num_images`, the number of different ones.
    """
    sums, counts = _sum_by_image(values, images)
    num_images, num_questions = len(counts), len(values)
    is_shared = 1 < num_images < num_questions
    interval = _bound(values, sums, counts) if is_shared else _bound_independent(values)
    over = "images" if is_shared else "questions"
    return {"interval": interval, "interval_over": over, "num_images": num_images}


def _sum_by_image(
    values: Sequence[float], images: Sequence[Hashable]
) -> tuple[list[float], list[int]]:
    """The sum of scores and the number of questions of every image."""
    sums: dict[Hashable, float] = {}
    counts: dict[Hashable, int] = {}
    for value, image in zip(values, images, strict=True):
        sums[image] = sums.get(image, 0.0) + value
        counts[image] = counts.get(image, 0) + 1
    return list(sums.values()), list(counts.values())


def _bound_independent(values: Sequence[float]) -> list[float]:
    ones = [1] * len(values)
    if set(values) <= {0, 1}:
        return wilson_interval(round(sum(values)), len(values))
    return _bound_normal(sum(values) / len(values), _compute_variance(values, ones), Z95)


def _bound(values: Sequence[float], sums: Sequence[float], counts: Sequence[int]) -> list[float]:
    """The interval over images, never narrower than the one over questions."""
    total = len(values)
    mean = sum(values) / total
    t = _get_student(len(counts) - 1)
    variance = max(_compute_variance(sums, counts), _compute_variance(values, [1] * total))
    if not set(values) <= {0, 1}:
        return _bound_normal(mean, variance, t)
    if mean in (0, 1):  # no variance is seen; images may be alike in all their answers
        return wilson_interval(mean * len(counts), len(counts))
    effective = mean * (1 - mean) / variance * (Z95 / t) ** 2
    return wilson_interval(mean * effective, effective)


def _bound_normal(mean: float, variance: float, quantile: float) -> list[float]:
    margin = quantile * math.sqrt(variance)
    return [max(0.0, mean - margin), min(1.0, mean + margin)]


def _compute_variance(sums: Sequence[float], counts: Sequence[int]) -> float:
    """The variance of the mean score over all questions, from what images differ in."""
    total, groups = sum(counts), len(counts)
    mean = sum(sums) / total
    squares = sum((one - mean * count) ** 2 for one, count in zip(sums, counts, strict=True))
    return squares / total**2 * groups / max(1, groups - 1)


def _get_student(degrees_of_freedom: int) -> float:
    """The two-sided 95 % quantile of Student's t (Cornish-Fisher, Abramowitz and Stegun 26.7.5)."""
    if degrees_of_freedom in STUDENT_95:
        return STUDENT_95[degrees_of_freedom]
    z, n = Z95, degrees_of_freedom
    series = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / n**power for power, term in enumerate(series, start=1))
