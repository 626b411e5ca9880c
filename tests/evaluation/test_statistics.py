"""Intervals cover the true value as often as they should, and only equal questions are compared."""

import time

import numpy as np
import pytest
from scipy import stats

from sparsecut.evaluation.exact_match import compute_scores
from sparsecut.evaluation.statistics import (
    Spread,
    estimate_accuracy,
    estimate_contrast,
    estimate_difference,
    pool_seed_spread,
)
from sparsecut.evaluation.variant_answers import Answers
from sparsecut.schema import UserError

LEVELS = ("high", "mid", "low")


def make_answers(
    shift, generator, *, num_seeds=5, num_images=120, seed_sd=0.0, ease=None, seeds=None
) -> Answers:
    """Answers that are right with probability 0.5 + shift + the seed's luck + the image's ease.

    There are two questions of each level about every image.
    """
    level = np.array(LEVELS * 2 * num_images)
    image = np.repeat(np.arange(num_images), 2 * len(LEVELS))
    ease = np.zeros(num_images) if ease is None else ease
    luck = np.zeros((num_seeds, 1))
    if seed_sd:
        luck = generator.normal(0, seed_sd, (num_seeds, 1))
    correct = generator.random((num_seeds, len(level))) < 0.5 + shift + luck + ease[image]
    ids = [f"{number}/{i}" for i, number in enumerate(image)]
    return Answers(correct, image, level, ids, seeds or list(range(num_seeds)))


def replace_correct(answers: Answers, correct) -> Answers:
    return Answers(correct, answers.image, answers.level, answers.ids, answers.seeds)


def improve(answers: Answers, fraction: float, generator) -> Answers:
    """The same answers with a fraction of the wrong ones made right."""
    flips = generator.random(answers.correct.shape) < fraction
    return replace_correct(answers, answers.correct | flips)


def get_width(estimate) -> float:
    return estimate.high - estimate.low


# ---- values


def test_the_average_is_that_of_scoring():
    answers = make_answers(0.1, np.random.default_rng(0))
    means = []
    for row in answers.correct:
        records = []
        for correct, level in zip(row, answers.level, strict=True):
            records.append({"correct": bool(correct), "group": None, "level": level})
        means.append(compute_scores(records)["mean_over_levels"])
    assert answers.mean_over_levels == pytest.approx(np.mean(means))
    contrast = estimate_accuracy(answers)
    assert contrast.average.value == pytest.approx(np.mean(means))
    assert list(contrast.levels) == sorted(LEVELS)


def test_a_variant_does_not_differ_from_itself():
    answers = make_answers(0.1, np.random.default_rng(0))
    average = estimate_difference(answers, answers).average
    assert (average.value, average.low, average.high, average.p) == (0, 0, 0, 1)
    assert not average.is_clear


def test_a_constant_shift_is_found_exactly():
    answers = make_answers(0.0, np.random.default_rng(0))
    none = replace_correct(answers, np.zeros_like(answers.correct))
    every = replace_correct(answers, np.ones_like(answers.correct))
    average = estimate_difference(every, none).average
    assert (average.value, average.low, average.high) == pytest.approx((1, 1, 1))
    assert average.is_clear
    assert average.p < 0.001
    assert estimate_difference(none, every).average.value == -average.value


def test_a_difference_of_differences():
    generator = np.random.default_rng(8)
    a = make_answers(0.2, generator)
    b = make_answers(0.0, generator)
    average = estimate_contrast([(1, a), (-1, b), (-1, a), (1, b)]).average
    assert (average.value, average.low, average.high) == pytest.approx((0, 0, 0), abs=1e-9)


def test_only_seeds_of_both_variants_are_compared():
    generator = np.random.default_rng(6)
    a = make_answers(0.1, generator)
    b = make_answers(0.0, generator, num_seeds=3, seeds=[2, 0, 9])
    contrast = estimate_difference(a, b)
    expected = a.correct[[0, 2]].mean() - b.correct[[1, 0]].mean()
    assert contrast.num_seeds == 2
    assert contrast.average.value == pytest.approx(expected)


def test_the_order_of_questions_and_seeds_does_not_matter():
    generator = np.random.default_rng(5)
    a = make_answers(0.0, generator)
    b = improve(a, 0.05, generator)
    order = generator.permutation(len(a.ids))
    ids = [a.ids[i] for i in order]
    mixed = []
    for answers in (b, a):
        correct = answers.correct[:, order]
        mixed.append(Answers(correct, a.image[order], a.level[order], ids, a.seeds))
    contrast = estimate_difference(b, a)
    other = estimate_difference(*mixed)
    estimates = [contrast.average, *contrast.levels.values()]
    other_estimates = [other.average, *other.levels.values()]
    for x, y in zip(estimates, other_estimates, strict=True):
        assert (x.value, x.low, x.high) == pytest.approx((y.value, y.low, y.high), abs=1e-6)
    reversed_seeds = Answers(b.correct[::-1], b.image, b.level, b.ids, b.seeds[::-1])
    average = estimate_difference(reversed_seeds, a).average
    assert average.value == pytest.approx(contrast.average.value)


# ---- intervals


def test_intervals_over_images_are_those_of_scipy():
    """With one seed and one level: the percentile bootstrap of questions, in clusters by image."""
    generator = np.random.default_rng(20)
    counts = generator.integers(1, 6, 150)  # questions about every image
    image = np.repeat(np.arange(150), counts)
    ease = generator.normal(0, 0.3, 150)[image]
    ids = [str(i) for i in range(len(image))]
    level = ["all"] * len(image)
    correct = (generator.random((1, len(image))) < 0.6 + ease).astype(float)
    other = (generator.random((1, len(image))) < 0.5 + ease).astype(float)
    a = Answers(correct, image, level, ids, [0])
    b = Answers(other, image, level, ids, [0])
    for contrast, scores in (
        (estimate_accuracy(a), correct[0]),
        (estimate_difference(a, b), correct[0] - other[0]),
    ):
        sums = np.bincount(image, weights=scores)
        expected = stats.bootstrap(
            (sums, counts),
            lambda sums, counts, axis: sums.sum(axis) / counts.sum(axis),
            paired=True,
            method="percentile",
            n_resamples=5000,
            rng=np.random.default_rng(0),
        ).confidence_interval
        interval = (contrast.average.low, contrast.average.high)
        assert interval == pytest.approx(tuple(expected), abs=0.05 * get_width(contrast.average))


def test_intervals_over_seeds_are_students():
    """Where all images agree, a pooled spread gives the interval of Student's t."""
    scores = np.array([0.1, 0.2, 0.3])
    correct = np.repeat(scores[:, None], 40, axis=1)
    ids = [str(i) for i in range(40)]
    answers = Answers(correct, ids, ["all"] * 40, ids, [0, 1, 2])
    none = replace_correct(answers, np.zeros_like(correct))
    spread = Spread(np.array([0.0, 0.0]), 6)  # the variants' own spread is larger
    average = estimate_difference(answers, none, spread=spread, resamples=50_000).average
    half_width = stats.t.ppf(0.975, 6) * scores.std(ddof=1) / 3**0.5
    interval = (average.low, average.high)
    expected = (0.2 - half_width, 0.2 + half_width)
    assert interval == pytest.approx(expected, abs=0.05 * half_width)


@pytest.mark.parametrize("seed_sd", [0.0, 0.03, 0.12])
def test_of_intervals_at_95_per_cent_about_95_in_100_cover_the_value(seed_sd):
    generator = np.random.default_rng(1)
    values = []
    widths = []
    num_covered = 0
    for _ in range(200):
        ease = generator.normal(0, 0.1, 60)
        settings = {"num_images": 60, "seed_sd": seed_sd, "ease": ease}
        a = make_answers(0.1, generator, **settings)
        b = make_answers(0.0, generator, **settings)
        average = estimate_difference(a, b, resamples=400).average
        num_covered += average.low <= 0.1 <= average.high
        values.append(average.value)
        widths.append(get_width(average))
    assert num_covered / 200 >= 0.925
    # Student's t of five seeds has 1.42 times the width of a normal distribution. The chance of one
    # question after one training counts twice, which is all there is without a spread of seeds.
    assert 1.3 <= np.mean(widths) / (2 * 1.96 * np.std(values)) <= 1.9


@pytest.mark.parametrize("comparisons", [1, 12])
def test_a_pooled_spread_gives_narrower_intervals_that_cover(comparisons):
    generator = np.random.default_rng(11)
    num_covered = 0
    widths = []
    for _ in range(60):
        variants = []
        for i in range(8):
            shift = 0.1 if i == 0 else 0.0
            variants.append(
                make_answers(shift, generator, num_seeds=3, num_images=60, seed_sd=0.04)
            )
        spread = pool_seed_spread(variants)
        assert spread.degrees_of_freedom == 14
        settings = {"comparisons": comparisons, "resamples": 400}
        pooled = estimate_difference(*variants[:2], spread=spread, **settings).average
        alone = estimate_difference(*variants[:2], **settings).average
        num_covered += pooled.low <= 0.1 <= pooled.high
        widths.append([get_width(pooled), get_width(alone)])
    assert num_covered / 60 >= 0.93
    mean_pooled, mean_alone = np.mean(widths, axis=0)
    assert mean_pooled < 0.8 * mean_alone


def test_what_a_seed_does_to_all_variants_is_no_spread():
    generator = np.random.default_rng(12)
    a = make_answers(0.0, generator, seed_sd=0.1)
    assert np.allclose(pool_seed_spread([a, replace_correct(a, a.correct)]).deviations, 0)
    single = make_answers(0.0, generator, num_seeds=1)
    assert pool_seed_spread([a]) is None
    assert pool_seed_spread([single] * 2) is None
    other = make_answers(0.1, generator, num_seeds=1)
    spread = pool_seed_spread([a, make_answers(0.0, generator, seed_sd=0.1)])
    pooled = estimate_difference(single, other, spread=spread)
    assert not pooled.note
    assert get_width(pooled.average) > 0.2


def test_pairing_makes_the_interval_narrower():
    generator = np.random.default_rng(2)
    a = make_answers(0.0, generator, ease=generator.normal(0, 0.2, 120))
    b = improve(a, 0.1, generator)
    paired = estimate_difference(b, a).average
    of_a = estimate_accuracy(a).average
    of_b = estimate_accuracy(b).average
    assert get_width(paired) < 0.8 * np.hypot(get_width(of_a), get_width(of_b))
    assert paired.value == pytest.approx(of_b.value - of_a.value)


def test_questions_about_an_image_are_one_draw():
    """Six questions that are right or wrong together tell as much as one."""
    generator = np.random.default_rng(3)
    answers = make_answers(0.0, generator, num_seeds=1, num_images=100)
    correct = np.repeat(generator.random(100) < 0.5, 6)[None]
    together = replace_correct(answers, correct)
    apart = Answers(correct, np.arange(600), answers.level, answers.ids, answers.seeds)
    wide = get_width(estimate_accuracy(together).average)
    narrow = get_width(estimate_accuracy(apart).average)
    assert wide == pytest.approx(6**0.5 * narrow, rel=0.1)


def test_more_comparisons_make_wider_intervals():
    generator = np.random.default_rng(4)
    a = make_answers(0.0, generator, seed_sd=0.02)
    b = improve(a, 0.05, generator)
    averages = [estimate_difference(b, a, comparisons=n).average for n in (1, 5, 25)]
    widths = [get_width(average) for average in averages]
    assert widths == sorted(widths)
    assert widths[0] < widths[2]
    assert averages[0].p == averages[2].p


def test_one_seed_covers_the_choice_of_images_only():
    generator = np.random.default_rng(7)
    a = make_answers(0.1, generator, num_seeds=1)
    b = make_answers(0.0, generator, num_seeds=1)
    contrast = estimate_difference(a, b)
    assert "one seed" in contrast.note
    assert contrast.average.low < contrast.average.value < contrast.average.high
    assert not estimate_accuracy(make_answers(0.1, generator)).note


# ---- mistakes, and time


def test_answers_to_other_questions_are_refused():
    generator = np.random.default_rng(9)
    a = make_answers(0.0, generator)
    renamed = Answers(a.correct, a.image, a.level, ["x", *a.ids[1:]], a.seeds)
    with pytest.raises(UserError, match="number 0 is '0/0' and 'x'"):
        estimate_difference(a, renamed)
    with pytest.raises(UserError, match="720 and 360"):
        estimate_difference(a, make_answers(0.0, generator, num_images=60))
    with pytest.raises(UserError, match=r"\[5, 6, 7, 8, 9\]"):
        estimate_difference(a, make_answers(0.0, generator, seeds=[5, 6, 7, 8, 9]))
    with pytest.raises(UserError, match=r"\(2, 720\).*5 seeds and 720 questions"):
        replace_correct(a, a.correct[:2])


def test_a_full_study_is_quick():
    generator = np.random.default_rng(10)
    a = make_answers(0.1, generator, num_images=600)
    b = make_answers(0.0, generator, num_images=600)
    estimate_difference(a, b)  # draws the images once
    start = time.process_time()
    estimate_difference(a, b)
    assert time.process_time() - start < 1
