"""Confidence intervals of accuracies and differences: a paired bootstrap over seeds and images.

Two variants answer the same questions after training with the same seeds, so that their difference
is taken question by question. Two things would be different in another experiment, and both are
drawn again:

* The images. All questions about an image are drawn together, because they are correlated.
* The seeds. Of S seeds, S - 1 are drawn with replacement, which makes the variance of the mean
  unbiased (Rao and Wu, 1988). Every draw is multiplied by sqrt((S - 1) / chi2(S - 1)), which turns
  a normal distribution into Student's t. Without both, intervals of five seeds are a third too
  narrow.

Few seeds estimate their spread poorly, and Student's t accounts for that: with three seeds,
intervals are twice as wide. If many variants were trained with the same seeds, `pool_seed_spread`
estimates one spread from all of them, as Dunnett's test (1955) does. It first removes what a seed
does to every variant. A contrast with a larger spread uses its own.

Draws of images and of seeds are independent, and their deviations are added. The residual (the
chance of one question after one training) is therefore counted twice. Intervals are a little too
wide, never too narrow.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache

import numpy as np

from ..schema import UserError
from .variant_answers import Answers, check_same_questions


@dataclass(frozen=True)
class Estimate:
    """A value with its confidence interval.

    Attributes:
        value: The value itself.
        low: Lower bound of the interval.
        high: Upper bound of the interval.
        p: Two-sided bootstrap probability of a value as far from zero, were zero true.
    """

    value: float
    low: float
    high: float
    p: float

    @property
    def is_clear(self) -> bool:
        """Whether the interval excludes zero."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class Spread:
    """How far one run is from the mean over seeds.

    Attributes:
        deviations: Standard deviations by level, then of the average over levels, [L + 1].
        degrees_of_freedom: Those of the estimate.
    """

    deviations: np.ndarray
    degrees_of_freedom: int


@dataclass(frozen=True)
class Contrast:
    """A weighted sum of accuracies, such as a difference, for every level and on average.

    Attributes:
        average: The estimate for the average over levels.
        levels: The estimate for every level.
        num_seeds: Seeds that were averaged. With one and no pooled spread, the intervals cover the
            choice of images only.
        comparisons: The intervals are at level 1 - 0.05 / comparisons; p-values are not corrected.
        is_pooled: Whether the spread between seeds was pooled over variants.
    """

    average: Estimate
    levels: dict[str, Estimate]
    num_seeds: int
    comparisons: int
    is_pooled: bool = False

    @property
    def note(self) -> str:
        """What a reader must know about these intervals; empty where there is nothing."""
        if self.num_seeds > 1 or self.is_pooled:
            return ""
        return (
            "one seed: the interval covers the choice of images only, another training may differ"
            " by more"
        )

    def to_dict(self) -> dict:
        """Plain numbers and strings, for JSON."""
        return {**asdict(self), "note": self.note}


def pool_seed_spread(*groups: Sequence[Answers]) -> Spread | None:
    """Estimate the spread between seeds from several variants.

    Within a group, the variants are compared over the seeds that all of them have. What a seed adds
    to every variant is removed, because it cancels in a difference.

    Args:
        groups: Groups of variants, such as one group for each training budget.

    Returns:
        The pooled spread, or None where no group has two variants and two seeds.
    """
    squares = 0.0
    degrees_of_freedom = 0
    for variants in groups:
        seeds = (
            set.intersection(*(set(answers.seeds) for answers in variants)) if variants else set()
        )
        if len(variants) < 2 or len(seeds) < 2:
            continue
        tables = []
        for answers in variants:
            rows = [list(answers.seeds).index(seed) for seed in sorted(seeds)]
            tables.append(_append_average(answers.accuracies[rows]))
        values = np.stack(tables)  # [variants, S, L + 1]
        variant_means = values.mean(1, keepdims=True)
        residual = values - values.mean(0) - variant_means + values.mean((0, 1))
        squares = squares + (residual**2).sum((0, 1))
        degrees_of_freedom += (len(variants) - 1) * (len(seeds) - 1)
    if not degrees_of_freedom:
        return None
    return Spread(np.sqrt(squares / degrees_of_freedom), degrees_of_freedom)


def pool_spread(*budgets: Mapping[str, Answers]) -> Spread | None:
    """The seeds' spread, pooled over variants that a budget trained with the same seeds.

    Args:
        budgets: Variant to its answers, for each training budget.
    """
    groups: dict[tuple, list[Answers]] = {}
    for i, by_variant in enumerate(budgets):
        for answers in by_variant.values():
            groups.setdefault((i, *sorted(answers.seeds)), []).append(answers)
    return pool_seed_spread(*groups.values())


def estimate_accuracy(answers: Answers, *, resamples: int = 10000, seed: int = 0) -> Contrast:
    """The accuracy of one variant with 95 % intervals; see `estimate_contrast`."""
    return estimate_contrast([(1.0, answers)], resamples=resamples, seed=seed)


def estimate_difference(
    a: Answers,
    b: Answers,
    *,
    comparisons: int = 1,
    spread: Spread | None = None,
    resamples: int = 10000,
    seed: int = 0,
) -> Contrast:
    """The accuracy of a minus that of b, paired by seed and question; see `estimate_contrast`."""
    return estimate_contrast(
        [(1.0, a), (-1.0, b)],
        comparisons=comparisons,
        spread=spread,
        resamples=resamples,
        seed=seed,
    )


def estimate_contrast(
    terms: Sequence[tuple[float, Answers]],
    *,
    comparisons: int = 1,
    spread: Spread | None = None,
    resamples: int = 10000,
    seed: int = 0,
) -> Contrast:
    """Estimate a weighted sum of the accuracies of variants, over the seeds that all have.

    Args:
        terms: Pairs (weight, answers), such as weights 1 and -1 for a difference.
        comparisons: Number of intervals that shall hold together at 95 % (Bonferroni).
        spread: A pooled spread between seeds, for weights that add up to zero. Without it, the
            seeds of these variants alone are drawn.
        resamples: Number of bootstrap draws.
        seed: Seed of the draws. Calls with as many images and seeds share their draws.

    Raises:
        UserError: The variants answered different questions or have no seed in common, or a number
            is too small.
    """
    if comparisons < 1 or resamples < 100:
        raise UserError(
            f"comparisons={comparisons} and resamples={resamples} were given, but at least 1"
            " comparison and 100 resamples are needed"
        )
    seeds = _get_common_seeds([answers for _, answers in terms])
    _, first = terms[0]
    for _, answers in terms[1:]:
        check_same_questions(first.ids, answers.ids, "one variant", "the other")
        if list(answers.level) != list(first.level):
            raise UserError(
                "the variants' questions have the same ids but different levels; evaluate them on"
                " the same file"
            )
    margins = _sum_terms(terms, seeds)
    by_seed, draws = _draw_images(margins, first, resamples, seed)
    values = by_seed.mean(0)
    if spread is None:
        draws += _draw_seed_weights(len(seeds), resamples, seed) @ (by_seed - values)
    else:
        draws += _draw_pooled_deviations(terms, by_seed, spread, resamples, seed)
    estimates = _summarize(terms, values, draws, comparisons)
    return Contrast(
        average=estimates[-1],
        levels=dict(zip(first.levels, estimates[:-1], strict=True)),
        num_seeds=len(seeds),
        comparisons=comparisons,
        is_pooled=spread is not None,
    )


def _get_common_seeds(variants: Sequence[Answers]) -> list[int]:
    """The seeds that all variants have; UserError where there is none."""
    common = []
    for seed in variants[0].seeds:
        if all(seed in answers.seeds for answers in variants):
            common.append(seed)
    if not common:
        lists = " and ".join(str(list(answers.seeds)) for answers in variants)
        raise UserError(
            f"variants are compared seed by seed, but {lists} have none in common; train them with"
            " the same seeds"
        )
    return common


def _sum_terms(terms: Sequence[tuple[float, Answers]], seeds: list[int]) -> np.ndarray:
    """The weighted sum of scores for every seed and question, [S, I]."""
    _, first = terms[0]
    margins = np.zeros((len(seeds), len(first.ids)))
    for weight, answers in terms:
        rows = [list(answers.seeds).index(seed) for seed in seeds]
        margins += weight * np.asarray(answers.correct, dtype=float)[rows]
    return margins


def _draw_images(
    margins: np.ndarray, questions: Answers, resamples: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Draw images with replacement, and compute the weighted sums of accuracies.

    Returns:
        The sums over all images by seed, [S, L + 1], and those of every draw, [R, L + 1].
    """
    sums, counts = _sum_by_image(margins, questions)
    by_seed = _append_average(sums.sum(2) / counts.sum(1))
    num_images = counts.shape[1]
    weights = _draw_image_weights(num_images, resamples, seed)
    mean_sums = sums.mean(0).T.astype(np.float32)
    drawn_counts = weights @ counts.T.astype(np.float32)
    # A level without a drawn question counts as none right.
    drawn_counts = np.maximum(drawn_counts, 1)
    draws = weights @ mean_sums / drawn_counts
    return by_seed, _append_average(draws).astype(float)


def _sum_by_image(margins: np.ndarray, questions: Answers) -> tuple[np.ndarray, np.ndarray]:
    """Sums of the margins, [S, L, P], and numbers of questions, [L, P], by level and image."""
    level_names = np.array([str(level) for level in questions.level])
    image_names = np.array([str(image) for image in questions.image])
    images, image_index = np.unique(image_names, return_inverse=True)
    all_sums = []
    all_counts = []
    for level in questions.levels:
        in_level = level_names == level
        index = image_index[in_level]
        counts = np.bincount(index, minlength=len(images))
        all_counts.append(counts.astype(float))
        sums = []
        for row in margins:
            weights = row[in_level]
            sums.append(np.bincount(index, weights=weights, minlength=len(images)))
        all_sums.append(sums)
    return np.array(all_sums).swapaxes(0, 1), np.array(all_counts)


def _append_average(values: np.ndarray) -> np.ndarray:
    """[..., L] -> [..., L + 1], with the mean over levels at the end."""
    return np.concatenate([values, values.mean(-1, keepdims=True)], axis=-1)


@lru_cache(maxsize=4)
def _draw_image_weights(num_images: int, resamples: int, seed: int) -> np.ndarray:
    """How often every image is drawn, [R, P]."""
    generator = np.random.default_rng((seed, 1))
    drawn = generator.integers(0, num_images, (resamples, num_images), dtype=np.int32)
    # Every resample counts in cells of its own.
    drawn += np.arange(resamples, dtype=np.int32)[:, None] * num_images
    counts = np.bincount(drawn.ravel(), minlength=resamples * num_images)
    return counts.reshape(resamples, num_images).astype(np.float32)


@lru_cache(maxsize=8)
def _draw_seed_weights(num_seeds: int, resamples: int, seed: int) -> np.ndarray:
    """Weights of the seeds' deviations from their mean, [R, S]; all zero for one seed."""
    if num_seeds == 1:
        return np.zeros((resamples, 1))
    generator = np.random.default_rng((seed, 2))
    free = num_seeds - 1  # degrees of freedom
    probabilities = np.full(num_seeds, 1 / num_seeds)
    counts = generator.multinomial(free, probabilities, size=resamples)
    chi_squared = generator.chisquare(free, (resamples, 1))
    stretch = np.sqrt(free / chi_squared)
    return counts / free * stretch


def _draw_pooled_deviations(
    terms: Sequence[tuple[float, Answers]],
    by_seed: np.ndarray,
    spread: Spread,
    resamples: int,
    seed: int,
) -> np.ndarray:
    """Deviations of the mean over seeds with a pooled spread, [R, L + 1]."""
    num_seeds = len(by_seed)
    observed = by_seed.std(0, ddof=1) if num_seeds > 1 else 0.0
    pooled = spread.deviations * sum(weight**2 for weight, _ in terms) ** 0.5
    student = _draw_student(spread.degrees_of_freedom, resamples, seed)
    return student * np.maximum(observed, pooled) / num_seeds**0.5


@lru_cache(maxsize=8)
def _draw_student(degrees_of_freedom: int, resamples: int, seed: int) -> np.ndarray:
    """Draws of Student's t, [R, 1]."""
    generator = np.random.default_rng((seed, 3))
    return generator.standard_t(degrees_of_freedom, (resamples, 1))


def _summarize(
    terms: Sequence[tuple[float, Answers]],
    values: np.ndarray,
    draws: np.ndarray,
    comparisons: int,
) -> list[Estimate]:
    """Percentile intervals and p-values of the draws, [R, L + 1]: one estimate for each column."""
    tail = 0.025 / comparisons
    bounds = np.quantile(draws, [tail, 1 - tail], axis=0)
    # Accuracies lie between 0 and 1, which bounds their weighted sum.
    largest = sum(max(weight, 0) for weight, _ in terms)
    smallest = -sum(max(-weight, 0) for weight, _ in terms)
    bounds = bounds.clip(smallest, largest)
    num_below = (draws <= 0).sum(0)
    num_above = (draws >= 0).sum(0)
    num_beyond_zero = np.minimum(num_below, num_above)
    p = np.minimum(1, 2 * (num_beyond_zero + 1) / (len(draws) + 1))
    estimates = []
    for i, value in enumerate(values):
        low, high = bounds[:, i]
        estimates.append(Estimate(float(value), float(low), float(high), float(p[i])))
    return estimates
