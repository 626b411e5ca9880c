"""The check of all records: several processes find what one finds, in the same order."""

import multiprocessing
import os
import signal
from functools import cache

import pytest
from helpers.tiny import tiny_model

from sparsecut.data import validation
from sparsecut.data.dataset import TrainingData
from sparsecut.data.encoding import FixedExampleEncoder, example_encoder
from sparsecut.data.errors import RecordError
from sparsecut.data.examples import Example
from sparsecut.data.length_limits import Limits
from sparsecut.data.validation import check_examples

BAD = (17, 18, 40)


@cache
def encoder() -> FixedExampleEncoder:
    return example_encoder(tiny_model()[1], limits=Limits(model_limit=100))


def make_examples() -> list[Example]:
    """Fifty records, three of which are too long."""
    examples = []
    for i in range(50):
        answer = "cat " * (300 if i in BAD else 3)
        messages = [
            {"role": "user", "content": "what is it"},
            {"role": "assistant", "content": answer},
        ]
        examples.append(Example(str(i), [], messages, source=f"record {i}"))
    return examples


@pytest.fixture
def two_processes(monkeypatch):
    monkeypatch.setattr(validation, "MANY", 10)
    monkeypatch.setattr(validation, "CHUNK", 2)
    monkeypatch.setattr(validation, "count_processes", lambda: 2)


def check() -> tuple[list[Example], list[tuple[str, str]]]:
    """The good examples, and the places and problems of the others."""
    problems = []
    good = check_examples(make_examples(), encoder(), problems=problems)
    return good, [(error.where, error.problem) for error in problems]


def test_bad_records_are_named_in_order():
    good, problems = check()
    assert len(good) == 47
    assert [where for where, _ in problems] == [f"record {i}" for i in BAD]
    with pytest.raises(RecordError, match=r"record 17: .*\b100\b"):
        check_examples(make_examples(), encoder())


def test_processes_find_what_one_finds(request):
    expected = check()
    request.getfixturevalue("two_processes")
    assert check() == expected


def test_many_errors_leave_no_process_that_waits_for_another(two_processes):
    for _ in range(10):
        with pytest.raises(RecordError, match="record 17"):
            check_examples(make_examples(), encoder())
    assert not multiprocessing.active_children()


def test_a_process_that_is_killed_is_named(two_processes, monkeypatch):
    def kill(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(FixedExampleEncoder, "check", kill)
    with pytest.raises(ChildProcessError, match=r"2 processes .*50 records"):
        check_examples(make_examples(), encoder())


def test_lengths_are_computed_once(monkeypatch):
    data = TrainingData(make_examples(), example_encoder(tiny_model()[1]))
    data._room = 0  # nothing stays in memory, as with large data
    first = data.lengths
    monkeypatch.setattr(data, "_encode", None)
    assert data.lengths is first
    assert first[17] > first[16]
