"""How sure a difference between arms is: paired bootstrap over seeds of training and pictures of
the test set.

Two arms answer the same questions after training with the same seeds, so their differences are taken question by question.
Two things would come out otherwise another time, and both are drawn again:

* the pictures. All questions of a picture are drawn together, because they are right or wrong together.
* the seeds. S - 1 of S seeds are drawn with replacement, which makes the variance of the mean unbiased (Rao and Wu, 1988), and
  every draw is stretched by sqrt((S - 1) / chi2(S - 1)), which makes Student's t of a normal
  distribution. Without both, five seeds give intervals that are a third too narrow, and corrected
  ones are worse.

Few seeds say little about their own spread, and Student's t pays for that: with three seeds, intervals are twice as wide and
corrected ones useless. Where many arms were trained with the same seeds, `seed_spread` pools what they say, as Dunnett's test
(1955) does, after taking out what a seed does to all of them. An arm whose own spread is larger keeps its own.

The draws of pictures and of seeds are independent and their deviations are added. What belongs to neither, the chance of one
question after one training, is then counted twice instead of once, so intervals are a little too wide, not too narrow.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache

import numpy as np

from ..schema import UserError


@dataclass(frozen=True)
class Answers:
    """What one arm answered: right [S seeds, I questions], 0 to 1, and for every question its
    picture, level and id, each [I].

    seeds: one number per row of right. A question without a level (None) is in no share. Raises
    ValueError where lengths differ.
    """

    right: np.ndarray
    picture: Sequence
    level: Sequence
    ids: Sequence[str]
    seeds: Sequence[int]

    def __post_init__(self):
        shape = np.shape(self.right)
        if shape != (len(self.seeds), len(self.ids)) or 0 in shape:
            raise UserError(
                f"answers are given as an array of shape {shape} for {len(self.seeds)} seeds and"
                f" {len(self.ids)} questions; give one row per seed and one column per question, at"
                " least one of each"
            )
        if not len(self.picture) == len(self.level) == len(self.ids):
            raise UserError(
                f"there are {len(self.ids)} questions, but {len(self.picture)} pictures and"
                f" {len(self.level)} levels; give one of each per question"
            )
        if len(set(self.seeds)) < len(self.seeds):
            raise UserError(
                f"the seeds {list(self.seeds)} name one twice; give every run its own seed"
            )

    @classmethod
    def from_records(cls, runs: dict[int, list[dict]]) -> Answers:
        """From the lines of predictions.jsonl by seed; ValueError where two seeds were asked
        different questions.
        """
        first = next(iter(runs.values()))
        ids = [r["id"] for r in first]
        for seed, records in runs.items():
            _same_questions(
                ids, [r["id"] for r in records], f"seed {next(iter(runs))}", f"seed {seed}"
            )
        levels = [r["level"] for r in first]
        if all(level is None for level in levels):
            levels = ["all"] * len(levels)
        pictures = ["\n".join(r["images"]) or r["id"] for r in first]
        right = np.array([[float(r["correct"]) for r in records] for records in runs.values()])
        return cls(right, pictures, levels, ids, list(runs))

    @property
    def levels(self) -> list[str]:
        """The levels' names, sorted."""
        return sorted({level for level in self.level if level is not None})

    @property
    def shares(self) -> np.ndarray:
        """Share right per seed and level, [S, L], levels in the order of `levels`."""
        level = np.array([str(name) for name in self.level])
        return np.stack(
            [np.asarray(self.right)[:, level == name].mean(1) for name in self.levels], axis=1
        )

    @property
    def mean_over_levels(self) -> float:
        """Mean over levels of the share right, over all seeds: the mean of what `scoring.scores`
        gives for each.
        """
        return float(self.shares.mean())


@dataclass(frozen=True)
class Estimate:
    """A figure with its interval [low, high]; p is the two-sided bootstrap probability of a value
    so far from zero.
    """

    value: float
    low: float
    high: float
    p: float

    @property
    def is_clear(self) -> bool:
        """Whether the interval leaves zero out."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class Spread:
    """How far one run of an arm is from its mean over seeds: standard deviations per level, then of
    the average, [L + 1].

    num_free: degrees of freedom they were estimated with.
    """

    deviations: np.ndarray
    num_free: int


def seed_spread(*groups: Sequence[Answers]) -> Spread | None:
    """The spread between seeds that arms have in common, pooled over groups of arms (one per
    budget, say).

    Within a group, arms are compared over the seeds that all of them have; what a seed adds to
    every arm is taken out, for it leaves no trace in a difference. None where no group has two arms
    and two seeds.
    """
    squares, free = 0.0, 0
    for arms in groups:
        seeds = set.intersection(*(set(a.seeds) for a in arms)) if arms else set()
        if len(arms) < 2 or len(seeds) < 2:
            continue
        order = sorted(seeds)
        rows = np.stack(
            [_with_average(a.shares[[list(a.seeds).index(s) for s in order]]) for a in arms]
        )
        rest = rows - rows.mean(0) - rows.mean(1, keepdims=True) + rows.mean((0, 1))
        squares, free = squares + (rest**2).sum((0, 1)), free + (len(arms) - 1) * (len(seeds) - 1)
    return Spread(np.sqrt(squares / free), free) if free else None


@dataclass(frozen=True)
class Contrast:
    """A figure for the average over levels and for every level, each 0 to 1, and what the intervals
    rest on.

    comparisons: the intervals are at level 1 - 0.05 / comparisons; p-values are not corrected.
    num_seeds: with one, and no pooled spread (is_pooled), the intervals speak of the pictures only,
    and `note` says so.
    """

    average: Estimate
    levels: dict[str, Estimate]
    num_seeds: int
    comparisons: int
    is_pooled: bool = False

    @property
    def note(self) -> str:
        """What a reader must know of these intervals, or nothing."""
        if self.num_seeds > 1 or self.is_pooled:
            return ""
        return (
            "one seed: the interval speaks of the pictures only, another training may differ by"
            " more"
        )

    def to_dict(self) -> dict:
        """Plain numbers and strings: what JSON holds."""
        return {**asdict(self), "note": self.note}


def interval(answers: Answers, *, resamples: int = 10000, seed: int = 0) -> Contrast:
    """The average of one arm and its levels with 95 % intervals."""
    return contrast([(1.0, answers)], resamples=resamples, seed=seed)


def difference(
    a: Answers,
    b: Answers,
    *,
    comparisons: int = 1,
    spread: Spread | None = None,
    resamples: int = 10000,
    seed: int = 0,
) -> Contrast:
    """a minus b, paired by seed and question, over the seeds both have; `contrast` says how."""
    return contrast(
        [(1.0, a), (-1.0, b)],
        comparisons=comparisons,
        spread=spread,
        resamples=resamples,
        seed=seed,
    )


def contrast(
    terms: Sequence[tuple[float, Answers]],
    *,
    comparisons: int = 1,
    spread: Spread | None = None,
    resamples: int = 10000,
    seed: int = 0,
) -> Contrast:
    """The weighted sum of arms' shares, such as 1 and -1 for a difference, with intervals at level
    1 - 0.05 / comparisons.

    Bonferroni's correction: of `comparisons` intervals, all hold together at 95 %. spread: a pooled
    one, for weights that add up to zero; without it the seeds of these arms alone are drawn. seed:
    of the draws, which are the same for every call with equal numbers of pictures and seeds. Raises
    ValueError where arms have other questions or no seed in common.
    """
    if comparisons < 1 or resamples < 100:
        raise UserError(
            f"comparisons={comparisons} and resamples={resamples} were given, but at least 1"
            " comparison and 100 resamples are needed"
        )
    first = terms[0][1]
    seeds = [s for s in first.seeds if all(s in answers.seeds for _, answers in terms)]
    if not seeds:
        given = " and ".join(str(list(answers.seeds)) for _, answers in terms)
        raise UserError(
            f"arms are compared seed by seed, but {given} have none in common; train them with the"
            " same seeds"
        )
    for _, answers in terms[1:]:
        _same_questions(first.ids, answers.ids, "one arm", "the other")
        if list(answers.level) != list(first.level):
            raise UserError(
                "the arms' questions have the same ids but different levels; evaluate them on the"
                " same file"
            )
    margin = np.zeros((len(seeds), len(first.ids)))
    for weight, answers in terms:
        rows = [list(answers.seeds).index(s) for s in seeds]
        margin += weight * np.asarray(answers.right, dtype=float)[rows]
    value, by_seed, draws = _draws(margin, first, resamples, seed)
    if spread is None:
        draws += _seed_weights(len(seeds), resamples, seed) @ (by_seed - value)
    else:
        own = by_seed.std(0, ddof=1) if len(seeds) > 1 else 0.0
        pooled = spread.deviations * sum(weight**2 for weight, _ in terms) ** 0.5
        draws += (
            _student(spread.num_free, resamples, seed) * np.maximum(own, pooled) / len(seeds) ** 0.5
        )
    tail = 0.025 / comparisons
    most, least = (sum(max(sign * weight, 0) for weight, _ in terms) for sign in (1, -1))
    low, high = np.quantile(draws, [tail, 1 - tail], axis=0).clip(
        -least, most
    )  # shares lie within 0 and 1
    fewer = np.minimum((draws <= 0).sum(0), (draws >= 0).sum(0))
    p = np.minimum(1, 2 * (fewer + 1) / (resamples + 1))
    found = [Estimate(*map(float, row)) for row in zip(value, low, high, p, strict=True)]
    return Contrast(
        found[-1],
        dict(zip(first.levels, found, strict=False)),
        len(seeds),
        comparisons,
        spread is not None,
    )


def _draws(
    margin: np.ndarray, items: Answers, resamples: int, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """margin [S, I] -> the figure per level, then averaged, [L + 1], the same by seed [S, L + 1],
    and drawn pictures' [R, L + 1].
    """
    names, levels = np.array([str(level) for level in items.level]), items.levels
    pictures, place = np.unique(
        np.array([str(picture) for picture in items.picture]), return_inverse=True
    )
    sums = np.zeros((len(margin), len(levels), len(pictures)))
    totals = np.zeros((len(levels), len(pictures)))
    for i, level in enumerate(levels):
        asked = names == level
        totals[i] = np.bincount(place[asked], minlength=len(pictures))
        for s, row in enumerate(margin):
            sums[s, i] = np.bincount(place[asked], weights=row[asked], minlength=len(pictures))
    by_seed = _with_average(sums.sum(2) / totals.sum(1))
    value = by_seed.mean(0)
    weights = _picture_weights(len(pictures), resamples, seed)
    asked = np.maximum(
        weights @ totals.T.astype(np.float32), 1
    )  # a level that no drawn picture asks about counts as none right
    drawn = _with_average(weights @ sums.mean(0).T.astype(np.float32) / asked)
    return value, by_seed, drawn.astype(float)


def _with_average(shares: np.ndarray) -> np.ndarray:
    return np.concatenate([shares, shares.mean(-1, keepdims=True)], axis=-1)


@lru_cache(maxsize=4)
def _picture_weights(number: int, resamples: int, seed: int) -> np.ndarray:
    """How often every picture is drawn, [R, P]."""
    chosen = np.random.default_rng((seed, 1)).integers(
        0, number, (resamples, number), dtype=np.int32
    )
    chosen += np.arange(resamples, dtype=np.int32)[:, None] * number
    return (
        np.bincount(chosen.ravel(), minlength=resamples * number)
        .reshape(resamples, number)
        .astype(np.float32)
    )


@lru_cache(maxsize=8)
def _seed_weights(number: int, resamples: int, seed: int) -> np.ndarray:
    """Weights of the seeds' deviations from their mean, [R, S]; all zero for one seed."""
    if number == 1:
        return np.zeros((resamples, 1))
    draw = np.random.default_rng((seed, 2))
    times = draw.multinomial(number - 1, np.full(number, 1 / number), size=resamples) / (number - 1)
    return times * np.sqrt((number - 1) / draw.chisquare(number - 1, (resamples, 1)))


@lru_cache(maxsize=8)
def _student(num_free: int, resamples: int, seed: int) -> np.ndarray:
    """Draws of Student's t, [R, 1]."""
    return np.random.default_rng((seed, 3)).standard_t(num_free, (resamples, 1))


def _same_questions(ours: Sequence[str], theirs: Sequence[str], one: str, other: str) -> None:
    """Refuse to compare answers to different questions."""
    if list(ours) == list(theirs):
        return
    if len(ours) != len(theirs):
        what = f"{len(ours)} and {len(theirs)} of them"
    else:
        i = next(i for i, (x, y) in enumerate(zip(ours, theirs, strict=True)) if x != y)
        what = f"number {i} is {ours[i]!r} and {theirs[i]!r}"
    raise UserError(
        f"{one} and {other} were asked different questions ({what}); evaluate both on the same file"
        " in the same order"
    )
