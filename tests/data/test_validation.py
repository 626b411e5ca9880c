"""The check of all records: several processes find what one finds, in the same order."""

import multiprocessing
import os
import signal

import pytest
from helpers.tiny import tiny_model

from sparsecut.data import validation as checking
from sparsecut.data.dataset import Example, TrainingData
from sparsecut.data.validation import check_examples

BAD = (17, 18, 40)


def records() -> list[Example]:
    """Fifty records, three of which are too long."""
    return [
        Example(
            str(i),
            [],
            [
                {"role": "user", "content": "what is it"},
                {"role": "assistant", "content": "cat " * (300 if i in BAD else 3)},
            ],
            source=f"record {i}",
        )
        for i in range(50)
    ]


def test_processes_find_what_one_finds_in_the_same_order(monkeypatch):
    processor = tiny_model()[1]
    found = []
    for many in (1000, 10):
        monkeypatch.setattr(checking, "MANY", many)
        monkeypatch.setattr(checking, "CHUNK", 7)
        monkeypatch.setattr(checking, "num_processes", lambda: 2)
        problems = []
        good = check_examples(records(), processor, limit=100, problems=problems)
        with pytest.raises(
            ValueError,
            match=r"record 17: the record has 3.. tokens, but the language model takes 100",
        ):
            check_examples(records(), processor, limit=100)
        found.append((good, [(error.where, error.problem) for error in problems]))
    assert found[0] == found[1]
    good, problems = found[0]
    assert len(good) == 47
    assert [where for where, _ in problems] == [f"record {i}" for i in BAD]


def test_a_process_that_is_killed_is_told_of_and_nobody_waits_for_it(monkeypatch):
    """Many bad records end many checks in the middle, which has to leave no process that waits for
    another.
    """
    processor = tiny_model()[1]
    monkeypatch.setattr(checking, "MANY", 10)
    monkeypatch.setattr(checking, "CHUNK", 2)
    monkeypatch.setattr(checking, "num_processes", lambda: 2)
    for _ in range(10):
        with pytest.raises(ValueError, match="record 17"):
            check_examples(records(), processor, limit=100)
    assert not multiprocessing.active_children()
    monkeypatch.setattr(checking, "_check", lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(ChildProcessError, match="was ended from outside"):
        check_examples(records(), processor, limit=100)


def test_lengths_are_found_once(monkeypatch):
    data = TrainingData(records(), tiny_model()[1])
    data._room = 0  # nothing is kept, as with large data
    first = data.lengths
    monkeypatch.setattr(data, "_tokens", None)
    assert data.lengths is first and first[17] > first[16]
