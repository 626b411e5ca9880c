"""Check all records of a stage before its first step, so that none stops the run later.

A record takes about a millisecond. So large data sets are divided among processes, where there are
cores for them.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from typing import NamedTuple

from ..waits import ignore_ctrl_c, show_step
from .encoding import ExampleEncoder
from .errors import RecordError
from .examples import Example
from .unknown_records import UnknownCount, UnknownText

MANY = 20_000  # with so many records, several processes are worth their start
CHUNK = 500  # records that a process takes at a time


# What is wrong with an example; None for one that is good in every way.
Problem = RecordError | UnknownText | None


class _Check(NamedTuple):
    """What is checked, and how."""

    examples: Sequence[Example]
    encoder: ExampleEncoder
    open_images: bool

    def find_problem(self, index: int, *, is_first: bool = False) -> Problem:
        try:
            return self.encoder.check(
                self.examples[index], open_images=self.open_images, is_first=is_first
            )
        except RecordError as error:
            return error


_process_check: list[_Check] = []  # in a process of the pool: its check


def check_examples(
    examples: Sequence[Example],
    encoder: ExampleEncoder,
    *,
    open_images: bool = False,
    problems: list[RecordError] | None = None,
    unknown: UnknownCount | None = None,
) -> list[Example]:
    """Return the examples that a model can be trained on.

    Args:
        examples: The examples; each is encoded once.
        encoder: Encodes them, and knows the limits.
        open_images: Open every image too.
        problems: Errors of bad examples are appended. Without it the first one is raised.
        unknown: Good examples whose words the tokenizer does not know are counted in it.

    Raises:
        RecordError: An example is bad, and no list of problems is given.
    """
    good = []
    check = _Check(examples, encoder, open_images)
    label = "checking records and images" if open_images else "checking records"
    with show_step(label, len(examples)) as step, closing(_find_problems(check)) as found:
        for example, problem in step.count(zip(examples, found, strict=True)):
            if not isinstance(problem, RecordError):
                good.append(example)
                if unknown is not None:
                    unknown.add(example, problem)
            elif problems is None:
                raise problem
            else:
                problems.append(problem)
    return good


def _find_problems(check: _Check) -> Iterator[Problem]:
    """The problem of each example, in order."""
    if check.encoder.checks_in_parallel and len(check.examples) >= MANY:
        num_processes = count_processes()
        if num_processes > 1:
            yield from _find_problems_in_parallel(check, num_processes)
            return
    has_good = False
    for index in range(len(check.examples)):
        problem = check.find_problem(index, is_first=not has_good)
        has_good = has_good or not isinstance(problem, RecordError)
        yield problem


def _find_problems_in_parallel(check: _Check, num_processes: int) -> Iterator[Problem]:
    """The same by several processes.

    They are forked and see the examples and the tokenizer as they are: only problems pass a pipe.
    They end by themselves, after the chunk at hand. A process that is killed while it holds a lock
    would make all others wait for ever.
    """
    context = multiprocessing.get_context("fork")
    pool = ProcessPoolExecutor(num_processes, context, _start_process, (check,))
    try:
        running: deque = deque()
        for start in range(0, len(check.examples), CHUNK):
            running.append(pool.submit(_check_chunk, start))
            if len(running) > 2 * num_processes:
                yield from running.popleft().result()
        while running:
            yield from running.popleft().result()
    except BrokenProcessPool:
        raise ChildProcessError(
            f"one of the {num_processes} processes that check {len(check.examples):,} records was"
            " ended from outside, as happens where memory runs out; close other programs, or split"
            " the data into smaller files"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def count_processes() -> int:
    """Return how many processes share a check.

    These are the cores of this process, divided among the processes that train on this machine.
    """
    if sys.platform != "linux":
        return 1
    return len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _start_process(check: _Check) -> None:
    ignore_ctrl_c()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # each process has a core of its own already
    _process_check[:] = [check]


def _check_chunk(start: int) -> list[Problem]:
    (check,) = _process_check
    end = min(start + CHUNK, len(check.examples))
    return [check.find_problem(index) for index in range(start, end)]
