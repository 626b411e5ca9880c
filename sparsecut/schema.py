"""Frozen dataclasses from the keys and values of a file, and errors that name what is allowed."""

from __future__ import annotations

import difflib
import json
import math
import os
import re
import time
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

LONGEST_MESSAGE = 2000  # characters; values that a message shows may be of any length
LONGEST_VALUE = 120  # of one value that a message shows


SECONDS_TO_WRITE = 5  # a part of a file that is older may have been left by a killed process


class UserError(ValueError):
    """A mistake that the user can mend: the message says what is wrong and what to do.

    The command line shows its message alone; any other exception keeps its traceback. The middle of
    a very long message is left out.
    """

    def __init__(self, message: str) -> None:
        if len(message) > LONGEST_MESSAGE:
            half = LONGEST_MESSAGE // 2
            message = f"{message[:half]} [...] {message[-half:]}"
        super().__init__(message)


TYPE_NAMES = {
    str: "text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    dict: "keys and values",
    tuple: "a list",
    NoneType: "nothing",
}


EXAMPLES = {int: "100", float: "0.1", bool: "true"}  # of values, as YAML has them
QUOTED = re.compile(r"\s*([-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?|true|false)\s*", re.IGNORECASE)


def read_text_file(path: str | Path, encoding: str = "utf-8") -> str:
    """Return the text of a file; UserError where it cannot be read or is not UTF-8 text."""
    try:
        return Path(path).read_text(encoding=encoding)
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8, or"
            " give another file"
        ) from error
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}); give a file that exists and may be read"
        ) from error


def write_text_file(path: str | Path, text: str) -> Path:
    """Replace a file at once: an interruption leaves the old one or the new. Return its path."""
    named, path = Path(path), Path(path).resolve()  # a link stays one
    is_stream = named.is_absolute() and named.parts[1:2] == ("dev",)  # such as /dev/stdout
    if is_stream or (path.exists() and not path.is_file()):  # a device or a pipe
        path.write_text(text, encoding="utf-8")
        return named
    part = path.with_name(f"{path.name}.{os.getpid()}.part")  # two processes do not share it
    for left in path.parent.glob(f"{path.name}.*.part"):
        _remove_left_part(left)
    with part.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
    return named


def _remove_left_part(part: Path) -> None:
    """Remove what a killed process left, and nothing that is being written."""
    import psutil

    pid = part.name.split(".")[-2]
    with suppress(OSError):  # gone just now
        is_old = time.time() - part.stat().st_mtime > SECONDS_TO_WRITE
        if is_old and pid.isdigit() and not psutil.pid_exists(int(pid)):
            part.unlink()


def read_json_file(path: str | Path) -> dict:
    """Return the keys and values of a JSON file; UserError where it holds anything else."""
    text = read_text_file(path)
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:  # also numbers of too many digits, and depth
        raise UserError(
            f"{path} is not valid JSON ({error}); mend it, or remove it and make it again"
        ) from error
    if not isinstance(values, dict):
        raise UserError(
            f"{path} holds {str(values)[:40]!r}, but keys and values are needed; mend it, or remove"
            " it and make it again"
        )
    return values


def build_dataclass(cls: type, values: Any, source: str, place: str = "") -> Any:
    """Build a dataclass from keys and values, as JSON and YAML hold them.

    A field whose annotation names a dataclass, alone or inside a tuple, is built in the same way.
    A key without a value (None) counts as left out.

    Args:
        cls: The dataclass.
        values: A dict of its fields.
        source: What `values` come from, for example a file's name. Errors begin with it.
        place: The dotted place inside the source, for example `stages.0`. Empty at the top.

    Raises:
        UserError: A key is unknown or missing, or the dataclass refuses a value.
    """
    _check_keys(cls, values, source, place)
    arguments = {key: value for key, value in values.items() if value is not None}
    for key, child in _get_child_classes(cls):
        value = arguments.get(key)
        if isinstance(value, list):
            arguments[key] = tuple(
                build_dataclass(child, item, source, _join(place, key, i))
                for i, item in enumerate(value)
            )
        elif value is not None:
            arguments[key] = build_dataclass(child, value, source, _join(place, key))
    try:
        return cls(**arguments)
    except UserError as error:
        subject = f"{source}: {place}" if place else source
        raise UserError(f"{subject}: {error}") from None


def _check_keys(cls: type, values: Any, source: str, place: str) -> None:
    """Raise UserError unless `values` is a dict of known keys that lacks none."""
    allowed = [f.name for f in fields(cls)]
    subject = f"{source}: {place}" if place else source
    if not isinstance(values, dict):
        shown = "empty" if values is None else show_value(values)
        raise UserError(
            f"{subject} is {shown}, but keys and values are needed: {', '.join(allowed)}"
        )
    for key in values:
        if key not in allowed:
            raise UserError(
                f"{source}: {_join(place, key)} is not known{nearest(key, allowed)}; allowed"
                f" {'in ' + place if place else 'at the top'} are {', '.join(allowed)}"
            )
    required = [f.name for f in fields(cls) if f.default is f.default_factory is MISSING]
    missing = [key for key in required if values.get(key) is None]
    if missing:
        raise UserError(f"{subject} lacks {' and '.join(missing)}; add what is missing")


@cache  # a study reads hundreds of recipes
def _get_hints(cls: type) -> dict[str, Any]:
    return get_type_hints(cls)


def _get_child_classes(cls: type) -> Iterator[tuple[str, type]]:
    """Yield (field, dataclass) where an annotation is `X`, `X | None` or `tuple[X, ...]`."""
    for key, hint in _get_hints(cls).items():
        kinds = () if get_origin(hint) is dict else (hint, *get_args(hint))
        for kind in kinds:
            if isinstance(kind, type) and is_dataclass(kind):
                yield key, kind


def _join(place: str, *keys: object) -> str:
    parts = (place, *keys) if place else keys
    return ".".join(str(part) for part in parts)


def check_types(value: Any) -> None:
    """Check that every field of a dataclass holds what its annotation says.

    `True` and `False` are not accepted as numbers.

    Raises:
        UserError: A field, or a value inside its list or keys and values, has another type.
    """
    cls: Any = type(value)
    for key, hint in _get_hints(cls).items():
        check_type(key, getattr(value, key), hint)


def check_type(key: str, held: Any, hint: Any) -> None:
    """Check that a value, and all inside it, is what an annotation says.

    Args:
        key: The value's name in errors.
        held: The value.
        hint: The annotation: classes, unions of them, `tuple[X, ...]` and `dict[K, V]`.

    Raises:
        UserError: It has another type, or is a number that is not finite.
    """
    hints = get_args(hint) if isinstance(hint, UnionType) else (hint,)
    allowed = tuple(get_origin(h) or h for h in hints)
    if float in allowed:
        allowed = (*allowed, int)
    is_misplaced_bool = isinstance(held, bool) and bool not in allowed
    _check_finite(key, held)
    if is_misplaced_bool or not isinstance(held, allowed):
        names = [TYPE_NAMES.get(kind, f"a {kind.__name__.lower()}") for kind in allowed]
        if float in allowed:
            names.remove(TYPE_NAMES[int])
        raise UserError(f"{key} is {show_value(held)}, but must be {' or '.join(names)}")
    for inner_hint in hints:
        arguments = get_args(inner_hint)
        if isinstance(held, tuple) and get_origin(inner_hint) is tuple:
            for number, item in enumerate(held):
                check_type(f"{key}.{number}", item, arguments[0])
        elif isinstance(held, dict) and get_origin(inner_hint) is dict:
            for name, item in held.items():
                check_type(f"a key of {key}", name, arguments[0])
                check_type(f"{key}.{name}", item, arguments[1])


def _check_finite(key: str, held: Any) -> None:
    """Raise UserError where a value, or one inside it, is NaN or infinite."""
    if isinstance(held, float) and not math.isfinite(held):
        raise UserError(f"{key} is {held}, but must be a finite number")
    if isinstance(held, dict):
        for name, item in held.items():
            _check_finite(f"{key}.{name}", item)
    elif isinstance(held, list | tuple):
        for number, item in enumerate(held):
            _check_finite(f"{key}.{number}", item)


def check_pattern(key: str, pattern: str | None) -> None:
    """Raise UserError where the text is not a regular expression."""
    try:
        re.compile(pattern or "")
    except re.error as error:
        raise UserError(
            f"{key} is {show_value(pattern)}, which is not a regular expression: {error}"
        ) from None


def check_choice(what: str, value: object, allowed: Collection[str]) -> None:
    """Check that a value is one of those allowed.

    Args:
        what: The value's name in the error.
        value: The value.
        allowed: The allowed values.

    Raises:
        UserError: It is not; the message has the nearest match.
    """
    if value not in tuple(allowed):  # a tuple, because a list or dict from a file has no hash
        raise UserError(
            f"{what} is {show_value(value)}{nearest(value, allowed)}, but allowed are"
            f" {', '.join(allowed)}"
        )


def make_tuples(value: Any, *names: str) -> None:
    """Turn fields of a frozen dataclass into tuples: from several values, or from a single one."""
    for name in names:
        held = getattr(value, name)
        is_single = isinstance(held, str | dict) or not isinstance(held, Iterable)
        object.__setattr__(value, name, (held,) if is_single else tuple(held))


def is_whole_number(value: object) -> bool:
    """Whether a value is an integer; `True` and `False` are not."""
    return isinstance(value, int) and not isinstance(value, bool)


def show_value(value: object) -> str:
    """Return a value as an error shows it: the middle of a long one is left out."""
    text = repr(value)
    half = LONGEST_VALUE // 2
    return text if len(text) <= LONGEST_VALUE else f"{text[:half]} [...] {text[-half:]}"


def suggest_value(key: str, text: object, kinds: Collection[Any]) -> str:
    """Return the end of an error where text stands in the place of a number, or of true or false.

    Args:
        key: What the value belongs to, such as "args.max_steps".
        text: What was given.
        kinds: The types that are allowed.

    Returns:
        What to write; empty where no text was given, or text is no mistake.
    """
    examples = [EXAMPLES[kind] for kind in kinds if kind in EXAMPLES]
    if not isinstance(text, str) or not examples:
        return ""
    if QUOTED.fullmatch(text):
        return "; write it without quotes"
    return f"; write for example {key.rpartition('.')[2]}: {examples[0]}"


def nearest(value: object, allowed: Collection[object]) -> str:
    """Return a hint for error messages: the allowed value closest to `value`, or nothing."""
    close = difflib.get_close_matches(str(value), [str(name) for name in allowed], n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
