"""Drawn inputs for tests/fuzz: strategies that are mostly right, and a runner with a time limit."""

import copy
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


def list_places(values, place=()) -> list[tuple]:
    """Every place of a tree, as keys from the top."""
    inner = values.items() if isinstance(values, dict) else enumerate(values)
    places = [place]
    for key, value in inner:
        if isinstance(value, dict | list):
            places += list_places(value, (*place, key))
        else:
            places.append((*place, key))
    return places


@st.composite
def draw_changed(draw_value, plain: dict, words: st.SearchStrategy = TEXTS) -> dict:
    """Values with one to three of them changed, removed, renamed or added; `words` are new keys."""
    plain = copy.deepcopy(plain)
    for _ in range(draw_value(st.integers(1, 3))):
        place = draw_value(st.sampled_from(list_places(plain)))
        if not place:
            plain[draw_value(words)] = draw_value(JUNK)
            continue
        holder = plain
        for key in place[:-1]:
            holder = holder[key]
        change = draw_value(st.sampled_from(["set", "junk", "remove", "rename"]))
        if change == "set":
            holder[place[-1]] = draw_value(LEAVES)
        elif change == "junk" or isinstance(holder, list):
            holder[place[-1]] = draw_value(JUNK)
        else:
            value = holder.pop(place[-1])
            if change == "rename":
                holder[draw_value(words)] = value
        if not isinstance(plain, dict) or not plain:
            break
    return plain


@st.composite
def draw_damaged(draw_value, content: bytes) -> bytes:
    """Bytes with one to four damages: cut, overwritten, doubled, or with others put in."""
    damaged = bytearray(content)
    for _ in range(draw_value(st.integers(1, 4))):
        place = draw_value(st.integers(0, len(damaged)))
        kind = draw_value(st.sampled_from(["cut", "write", "insert", "repeat", "flip"]))
        if kind == "cut":
            del damaged[place : place + draw_value(st.integers(1, 200))]
        elif kind == "write":
            piece = draw_value(st.binary(min_size=1, max_size=8))
            damaged[place : place + len(piece)] = piece
        elif kind == "insert":
            damaged[place:place] = draw_value(st.binary(max_size=20))
        elif kind == "repeat":
            damaged[place:place] = damaged[max(0, place - 40) : place]
        elif place < len(damaged):
            damaged[place] ^= 1 << draw_value(st.integers(0, 7))
    return bytes(damaged)


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
