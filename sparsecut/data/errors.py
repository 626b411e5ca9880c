"""The error of one record among many."""

from __future__ import annotations

import reprlib
from typing import Any

from ..schema import UserError


class RecordError(UserError):
    """One record that cannot be used.

    Attributes:
        where: The record's place, such as "train.jsonl line 7".
        problem: What is wrong with it, without its place.
    """

    def __init__(self, where: str, problem: str):
        super().__init__(f"{where}: {problem}")
        self.where = where
        self.problem = problem

    def __reduce__(self):
        # Unpickling an exception calls its class with `args`, which holds the whole message alone.
        return RecordError, (self.where, self.problem)


_shown = reprlib.Repr()
_shown.maxstring = _shown.maxother = 80


def show_value(value: Any) -> str:
    """Return a value of a record for a message: however long or nested it is, this is short."""
    return _shown.repr(value)
