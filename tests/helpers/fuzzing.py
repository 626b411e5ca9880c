"""Drawn inputs for tests/fuzz: strategies that are mostly right, and a runner with a time limit."""

import os
import time
from collections.abc import Callable

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

EXAMPLES = 40  # of one round
TOTAL_SECONDS = float(os.environ.get("FUZZ_SECONDS", "0"))  # 0: one round of each target
FIRST_SEED = int(os.environ.get("FUZZ_SEED", "0"))

NUMBERS = st.one_of(
    st.integers(-5, 50),
    st.integers(),
    st.floats(),
    st.sampled_from([10**18, -(2**63), 10**4299, 1e308, True, False]),
)
TEXTS = st.one_of(
    st.text(max_size=8),
    st.sampled_from(
        ["", "(", "../..", "/dev/null", "\0", "\ud800", "\x1b[2J", "a" * 300, "$NO_VAR"]
    ),
)
LEAVES = st.one_of(st.none(), NUMBERS, TEXTS)
JUNK = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(TEXTS, inner, max_size=3),
        st.dictionaries(NUMBERS, inner, max_size=1),
    ),
    max_leaves=6,
)


def mostly(*right: st.SearchStrategy, wrong: st.SearchStrategy = JUNK) -> st.SearchStrategy:
    """Draw from `right`, and once in sixteen times from `wrong`."""
    either = st.one_of(*right)
    return st.integers(0, 15).flatmap(lambda number: either if number else wrong)


def run_fuzz(check: Callable, strategy: st.SearchStrategy, seconds: float) -> int:
    """Check drawn examples, round by round with seeds that count up, until time is over.

    A failure is shrunk to a small example, and names its seed: FUZZ_SEED repeats it.

    Args:
        check: Takes an example, and raises where something is wrong.
        strategy: What examples are drawn from.
        seconds: 0 for one round.

    Returns:
        The number of examples.
    """
    count = 0

    def count_and_check(example):
        nonlocal count
        count += 1
        check(example)

    limits = settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        print_blob=False,
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.explicit, Phase.generate, Phase.shrink),
    )
    end = time.monotonic() + seconds
    number = FIRST_SEED
    while True:
        # A fresh function, because hypothesis fixes the seed on the function itself.
        test = seed(number)(limits(given(strategy)(lambda example: count_and_check(example))))
        try:
            test()
        except BaseException as error:
            error.add_note(f"to repeat: FUZZ_SEED={number}")
            raise
        number += 1
        if time.monotonic() >= end:
            return count
