"""Every record of a stage is written and encoded once before the first step, so that nothing of it
stops the run later.

A record takes about a millisecond, so of large data sets each process checks a share of the records, where there are cores for it.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing

from ..prompts import is_fixed
from ..schema import UserError
from .encoding import check_length, encode, written
from .errors import RecordError
from .examples import Example
from .native_encoding import encode_batch, num_tokens_about

NEAR = 0.5  # of a limit: records this long by estimate are measured
MANY = 20_000  # records from which on several processes are worth their start
CHUNK = 500  # records that a process takes at a time
_work: list = []  # in a process of the pool: what it checks, and how


def check_examples(
    examples: Sequence[Example],
    processor,
    *,
    template: str = "chat",
    max_length: int | None = None,
    limit: int | None = None,
    max_images: int | None = None,
    open_pictures: bool = False,
    problems: list[RecordError] | None = None,
) -> list[Example]:
    """The examples that a model can be trained on: all are written once, and with open_pictures
    every picture is opened.

    max_length: cut there; limit: what the language model can take, longer records are refused, and
    those with more than max_images image tokens. Raises ValueError at the first bad record or,
    where a list of problems is given, notes a sentence there and leaves it out.
    """
    good, settings = [], (processor, template, max_length, limit, max_images, open_pictures)
    with closing(_find_errors(examples, settings)) as errors:
        for example, error in zip(examples, errors, strict=True):
            if error is None:
                good.append(example)
            elif problems is None:
                raise error
            else:
                problems.append(error)
    return good


def _find_errors(examples: Sequence[Example], settings: tuple) -> Iterator[RecordError | None]:
    """What is wrong with each example, in order; None for a good one."""
    num = num_processes() if len(examples) >= MANY and is_fixed(settings[0]) else 1
    if num > 1:
        yield from _shared_out(examples, settings, num)
        return
    first = True
    for example in examples:
        error = _find_error(example, settings, first=first)
        first = first and error is not None
        yield error


def _shared_out(
    examples: Sequence[Example], settings: tuple, num: int
) -> Iterator[RecordError | None]:
    """The same by num processes.

    Forked, they see the examples and the tokenizer as they are: nothing is copied or written to a
    pipe but errors. They are left to end by themselves, after the chunk at hand: one that is
    killed while it holds a lock keeps everyone waiting for ever.
    """
    pool = ProcessPoolExecutor(
        num, multiprocessing.get_context("fork"), _begin, (examples, settings)
    )
    try:
        running: deque = deque()
        for start in range(0, len(examples), CHUNK):
            running.append(pool.submit(_of_chunk, start))
            if len(running) > 2 * num:
                yield from running.popleft().result()
        while running:
            yield from running.popleft().result()
    except BrokenProcessPool:
        raise ChildProcessError(
            f"one of the {num} processes that check {len(examples):,} records was ended from"
            " outside, as happens where memory runs out; close other programs, or split the data"
            " into smaller files"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def num_processes() -> int:
    """How many processes share the check: this process's cores, divided among the processes that
    train on this machine.
    """
    if sys.platform != "linux":
        return 1
    return len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _begin(examples: Sequence[Example], settings: tuple) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # each process has a core of its own already
    _work[:] = examples, settings


def _of_chunk(start: int) -> list[RecordError | None]:
    examples, settings = _work
    return [
        _find_error(example, settings, first=False) for example in examples[start : start + CHUNK]
    ]


def _find_error(example: Example, settings: tuple, *, first: bool) -> RecordError | None:
    try:
        _check(example, *settings, first=first)
    except RecordError as error:
        return error
    return None


def _check(
    example, processor, template, max_length, limit, max_images, open_pictures: bool, *, first: bool
) -> None:
    """Raise ValueError naming the record that cannot be learned from.

    How many tokens pictures take is known to a base's processor only once it has prepared them,
    which for all would take as long as an epoch's preparation: the first record and those near a
    limit are prepared, and the collator refuses what still is too long.
    """
    bound = min(max_length or math.inf, limit or math.inf)
    if is_fixed(processor):
        ids = encode(example, processor, template, max_length=max_length)["input_ids"]
        try:
            check_length(ids, processor, None, limit, max_images)
        except UserError as error:
            raise RecordError(example.place, str(error)) from None
        if open_pictures:
            example.pictures()
    else:
        text, _ = written(example, processor, template)
        if first or (
            open_pictures and num_tokens_about(processor, text, example.pictures()) > NEAR * bound
        ):
            encode_batch(
                [example],
                processor,
                template,
                max_length=max_length,
                limit=limit,
                max_images=max_images,
            )
