"""Intervals hold what they promise on made-up arms of known accuracy, and only equal questions are
compared.
"""

import time

import numpy as np
import pytest

from sparsecut.evaluation import scoring
from sparsecut.evaluation.statistics import (
    Answers,
    estimate_accuracy,
    estimate_contrast,
    estimate_difference,
    pool_seed_spread,
)

LEVELS = ("high", "mid", "low")


def made_up(
    shift, rng, *, seeds=5, pictures=120, per_level=2, seed_sd=0.0, ease=None, names=None
) -> Answers:
    """Answers that are right with probability 0.5 + shift + the seed's luck + the picture's
    ease.
    """
    level = np.array(LEVELS * per_level * pictures)
    picture = np.repeat(np.arange(pictures), per_level * len(LEVELS))
    ease = np.zeros(pictures) if ease is None else ease
    luck = rng.normal(0, seed_sd, (seeds, 1)) if seed_sd else np.zeros((seeds, 1))
    right = rng.random((seeds, len(level))) < 0.5 + shift + luck + ease[picture]
    ids = [f"{p}/{i}" for i, p in enumerate(picture)]
    return Answers(right, picture, level, ids, names or list(range(seeds)))


def flipped(answers: Answers, share: float, rng) -> Answers:
    """The same answers with a share of the wrong ones made right."""
    right = answers.correct | (rng.random(answers.correct.shape) < share)
    return Answers(right, answers.image, answers.level, answers.ids, answers.seeds)


def test_the_average_is_that_of_scoring():
    a = made_up(0.1, np.random.default_rng(0))
    records = [
        [
            {"correct": bool(c), "group": None, "level": lv}
            for c, lv in zip(row, a.level, strict=True)
        ]
        for row in a.correct
    ]
    expected = np.mean([scoring.compute_scores(r)["mean_over_levels"] for r in records])
    assert a.mean_over_levels == pytest.approx(expected)
    assert estimate_accuracy(a).average.value == pytest.approx(expected)
    assert list(estimate_accuracy(a).levels) == sorted(LEVELS)


def test_an_arm_does_not_differ_from_itself():
    a = made_up(0.1, np.random.default_rng(0))
    d = estimate_difference(a, a)
    assert (d.average.value, d.average.low, d.average.high, d.average.p) == (0, 0, 0, 1)
    assert not d.average.is_clear


def test_a_constant_shift_is_found_exactly():
    a = made_up(0.0, np.random.default_rng(0))
    none = Answers(np.zeros_like(a.correct), a.image, a.level, a.ids, a.seeds)
    every = Answers(np.ones_like(a.correct), a.image, a.level, a.ids, a.seeds)
    d = estimate_difference(every, none)
    assert (d.average.value, d.average.low, d.average.high) == pytest.approx((1, 1, 1))
    assert d.average.is_clear and d.average.p < 0.001
    assert estimate_difference(none, every).average.value == -d.average.value


@pytest.mark.parametrize("seed_sd", [0.0, 0.03, 0.12])
def test_of_95_per_cent_intervals_about_95_in_100_hold(seed_sd):
    rng, held, number = np.random.default_rng(1), 0, 400
    for _ in range(number):
        ease = rng.normal(0, 0.1, 60)
        a = made_up(0.1, rng, pictures=60, seed_sd=seed_sd, ease=ease)
        b = made_up(0.0, rng, pictures=60, seed_sd=seed_sd, ease=ease)
        average = estimate_difference(a, b, resamples=500).average
        held += average.low <= 0.1 <= average.high
    assert 0.925 <= held / number <= 0.999


@pytest.mark.parametrize("comparisons", [1, 12])
def test_a_pooled_spread_makes_intervals_of_three_seeds_narrower_and_they_hold(comparisons):
    rng, held, widths, number = np.random.default_rng(11), 0, [], 150
    for _ in range(number):
        arms = [made_up(0.1 * (i == 0), rng, seeds=3, pictures=60, seed_sd=0.04) for i in range(8)]
        spread = pool_seed_spread(arms)
        assert spread.degrees_of_freedom == 14
        pooled = estimate_difference(
            arms[0], arms[1], comparisons=comparisons, spread=spread, resamples=500
        ).average
        alone = estimate_difference(
            arms[0], arms[1], comparisons=comparisons, resamples=500
        ).average
        held += pooled.low <= 0.1 <= pooled.high
        widths.append([pooled.high - pooled.low, alone.high - alone.low])
    assert held / number >= 0.93
    assert np.mean(widths, axis=0)[0] < 0.8 * np.mean(widths, axis=0)[1]


def test_what_a_seed_does_to_all_arms_is_no_spread():
    rng = np.random.default_rng(12)
    a = made_up(0.0, rng, seed_sd=0.1)
    lifted = Answers(a.correct.copy(), a.image, a.level, a.ids, a.seeds)
    assert np.allclose(pool_seed_spread([a, lifted]).deviations, 0)
    assert (
        pool_seed_spread([a]) is None and pool_seed_spread([made_up(0.0, rng, seeds=1)] * 2) is None
    )
    one = made_up(0.0, rng, seeds=1)
    pooled = estimate_difference(
        one,
        made_up(0.1, rng, seeds=1),
        spread=pool_seed_spread([a, made_up(0.0, rng, seed_sd=0.1)]),
    )
    assert not pooled.note and pooled.average.high - pooled.average.low > 0.2


def test_pairing_makes_the_interval_narrower():
    rng = np.random.default_rng(2)
    a = made_up(0.0, rng, ease=rng.normal(0, 0.2, 120))
    b = flipped(a, 0.1, rng)
    paired, apart = (
        estimate_difference(b, a).average,
        (estimate_accuracy(a).average, estimate_accuracy(b).average),
    )
    unpaired = sum((e.high - e.low) ** 2 for e in apart) ** 0.5
    assert paired.high - paired.low < 0.8 * unpaired
    assert paired.value == pytest.approx(apart[1].value - apart[0].value)


def test_questions_of_a_picture_are_one_draw():
    """Six questions that are right or wrong together tell no more than one."""
    rng = np.random.default_rng(3)
    a = made_up(0.0, rng, seeds=1, pictures=100)
    whole = np.repeat(rng.random(100) < 0.5, 6)[None]
    together = Answers(whole, a.image, a.level, a.ids, a.seeds)
    as_if_alone = Answers(whole, np.arange(600), a.level, a.ids, a.seeds)
    wide, narrow = (
        e.average.high - e.average.low
        for e in (estimate_accuracy(together), estimate_accuracy(as_if_alone))
    )
    assert wide == pytest.approx(6**0.5 * narrow, rel=0.1)


def test_more_comparisons_make_wider_intervals():
    rng = np.random.default_rng(4)
    a = made_up(0.0, rng, seed_sd=0.02)
    b = flipped(a, 0.05, rng)
    widths = [
        (e := estimate_difference(b, a, comparisons=n).average).high - e.low for n in (1, 5, 25)
    ]
    assert widths == sorted(widths) and widths[0] < widths[2]
    assert (
        estimate_difference(b, a, comparisons=25).average.p == estimate_difference(b, a).average.p
    )


def test_the_order_of_questions_and_seeds_does_not_matter():
    rng = np.random.default_rng(5)
    a = made_up(0.0, rng)
    b = flipped(a, 0.05, rng)
    order = rng.permutation(len(a.ids))
    mixed = [
        Answers(
            x.correct[:, order], x.image[order], x.level[order], [x.ids[i] for i in order], x.seeds
        )
        for x in (b, a)
    ]
    one, other = estimate_difference(b, a), estimate_difference(*mixed)
    for x, y in zip(
        (one.average, *one.levels.values()), (other.average, *other.levels.values()), strict=True
    ):
        assert (x.value, x.low, x.high) == pytest.approx((y.value, y.low, y.high), abs=1e-6)
    reversed_seeds = Answers(b.correct[::-1], b.image, b.level, b.ids, b.seeds[::-1])
    assert estimate_difference(reversed_seeds, a).average.value == pytest.approx(one.average.value)


def test_only_seeds_of_both_arms_are_compared():
    rng = np.random.default_rng(6)
    a, b = made_up(0.1, rng), made_up(0.0, rng, seeds=3, names=[2, 0, 9])
    d = estimate_difference(a, b)
    expected = a.correct[[0, 2]].mean() - b.correct[[1, 0]].mean()
    assert d.num_seeds == 2 and d.average.value == pytest.approx(expected)


def test_one_seed_speaks_of_pictures_only():
    rng = np.random.default_rng(7)
    d = estimate_difference(made_up(0.1, rng, seeds=1), made_up(0.0, rng, seeds=1))
    assert "one seed" in d.note and d.average.low < d.average.value < d.average.high
    assert not estimate_difference(made_up(0.1, rng), made_up(0.0, rng)).note


def test_a_difference_of_differences():
    rng = np.random.default_rng(8)
    a, b = made_up(0.2, rng), made_up(0.0, rng)
    change = estimate_contrast([(1, a), (-1, b), (-1, a), (1, b)]).average
    assert (change.value, change.low, change.high) == pytest.approx((0, 0, 0), abs=1e-9)


def test_other_questions_are_refused():
    rng = np.random.default_rng(9)
    a = made_up(0.0, rng)
    renamed = Answers(a.correct, a.image, a.level, ["x", *a.ids[1:]], a.seeds)
    with pytest.raises(ValueError, match=r"number 0 is '0/0' and 'x'.*same file"):
        estimate_difference(a, renamed)
    with pytest.raises(ValueError, match=r"720 and 360.*same file"):
        estimate_difference(a, made_up(0.0, rng, pictures=60))
    with pytest.raises(ValueError, match="none in common"):
        estimate_difference(a, made_up(0.0, rng, names=[5, 6, 7, 8, 9]))
    with pytest.raises(ValueError, match="one row per seed"):
        Answers(a.correct[:2], a.image, a.level, a.ids, a.seeds)


def test_a_full_study_is_quick():
    rng = np.random.default_rng(10)
    a, b = made_up(0.1, rng, pictures=600), made_up(0.0, rng, pictures=600)
    estimate_difference(a, b)  # draws the pictures once
    start = time.process_time()
    estimate_difference(a, b)
    assert time.process_time() - start < 1
