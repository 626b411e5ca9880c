"""Frozen dataclasses from the keys and values of a file: every wrong key or value is a sentence
that says what is allowed.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import MISSING, fields
from types import NoneType, UnionType
from typing import get_args, get_origin, get_type_hints


class UserError(ValueError):
    """A mistake that the user can mend: the message says what is wrong and what to do.

    The command line shows its message alone; any other exception keeps its traceback.
    """


KINDS = {
    str: "text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    dict: "keys and values",
    tuple: "a list",
    NoneType: "nothing",
}


def build_checked(cls, plain, name: str, children: dict, at: str = ""):
    """A dataclass from keys and values, its children (class -> key -> their class) too; ValueError
    starts with `name`.

    at: the dotted place inside the file, for messages.
    """
    names = [f.name for f in fields(cls)]
    if not isinstance(plain, dict):
        raise UserError(
            f"{name}: {at or 'the file'} is {plain!r}, but keys and values are needed:"
            f" {', '.join(names)}"
        )
    for key in plain:
        if key not in names:
            raise UserError(
                f"{name}: {_join(at, key)} is not known{nearest(key, names)}; allowed"
                f" {'in ' + at if at else 'at the top'} are {', '.join(names)}"
            )
    needed = [f.name for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING]
    if missing := [key for key in needed if plain.get(key) is None]:
        raise UserError(
            f"{name}: {at or 'the file'} lacks {' and '.join(missing)}; add what is missing"
        )
    values = {key: value for key, value in plain.items() if value is not None}
    for key, child in children.get(cls, {}).items():
        if isinstance(values.get(key), list):
            values[key] = tuple(
                build_checked(child, item, name, children, f"{_join(at, key)}.{i}")
                for i, item in enumerate(values[key])
            )
        elif key in values:
            values[key] = build_checked(child, values[key], name, children, _join(at, key))
    try:
        return cls(**values)
    except ValueError as error:
        raise UserError(f"{name}: {at + ': ' if at else ''}{error}") from None


def check_types(value) -> None:
    """Raise ValueError where a field of a dataclass does not hold what its annotation says; a truth
    value is no number.
    """
    for key, hint in get_type_hints(type(value)).items():
        hints = get_args(hint) if isinstance(hint, UnionType) else (hint,)
        kinds, given = tuple(get_origin(h) or h for h in hints), getattr(value, key)
        if not isinstance(given, kinds) or (isinstance(given, bool) and bool not in kinds):
            allowed = " or ".join(KINDS.get(kind, f"a {kind.__name__.lower()}") for kind in kinds)
            raise UserError(f"{key} is {given!r}, but must be {allowed}")


def check_pattern(key: str, pattern: str | None) -> None:
    """Raise ValueError where the text is no regular expression."""
    try:
        re.compile(pattern or "")
    except re.error as error:
        raise UserError(f"{key} is {pattern!r}, which is no regular expression: {error}") from None


def as_tuples(value, *names: str) -> None:
    """Let fields of a frozen dataclass be tuples: of a list, or of the one value given."""
    for name in names:
        given = getattr(value, name)
        object.__setattr__(
            value, name, tuple(given) if isinstance(given, list | tuple) else (given,)
        )


def one_of(what: str, given, allowed) -> None:
    """Raise ValueError, with the nearest match, where a value is none of those allowed."""
    if given not in allowed:
        raise UserError(
            f"{what} is {given!r}{nearest(given, allowed)}, but allowed are {', '.join(allowed)}"
        )


def _join(at: str, key) -> str:
    return f"{at}.{key}" if at else str(key)


def nearest(word, words) -> str:
    """A hint for error messages: the allowed word closest to the one given, or nothing."""
    close = difflib.get_close_matches(str(word), list(words), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
