"""Columns of classes, which hold numbers: the records get the classes' names."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ..schema import UserError
from .errors import show_value

METADATA = b"huggingface"  # key under which `datasets` keeps the features in a table's schema
LISTS = ("Sequence", "List", "LargeList")

ClassNames = Mapping[str, Sequence[str]]  # column -> names of its classes


def find_class_names(features: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return the columns of classes, and of lists of them, with the names of their classes.

    Args:
        features: Features of `datasets`, or the same as they stand in a file.
    """
    found = {}
    for column, feature in features.items():
        inner = _get(feature, "feature") if _get_kind(feature) in LISTS else feature
        names = _get(inner, "names")
        if _get_kind(inner) == "ClassLabel" and isinstance(names, list):
            found[column] = [str(name) for name in names]
    return found


def read_class_names(schema) -> dict[str, list[str]]:
    """Return the same of an Arrow schema, where `datasets` has written it."""
    try:
        facts = json.loads((schema.metadata or {})[METADATA])
        return find_class_names(facts["info"]["features"])
    except (KeyError, TypeError, ValueError, AttributeError):
        return {}  # other tools write no features, and damaged ones name nothing


def _get(feature: Any, name: str) -> Any:
    return feature.get(name) if isinstance(feature, Mapping) else getattr(feature, name, None)


def _get_kind(feature: Any) -> str | None:
    return _get(feature, "_type")


def name_classes(record: dict, names: ClassNames) -> dict:
    """Return a record with the names of classes in place of their numbers.

    A class that is not known, -1, becomes nothing.

    Raises:
        UserError: A number has no name.
    """
    named = {}
    for column in names:
        if column in record:
            named[column] = _name(record[column], column, names[column])
    return {**record, **named}


def _name(value: Any, column: str, names: Sequence[str]) -> Any:
    if isinstance(value, list):
        return [_name(item, column, names) for item in value]
    if isinstance(value, str):
        if value in names or not value.strip().isdecimal():
            return value
        value = int(value)  # a table of text has no numbers
    if isinstance(value, bool) or not isinstance(value, int) or value == -1:
        return None if value == -1 else value
    if not 0 <= value < len(names):
        raise UserError(
            f"`{column}` is {value}, but there are {len(names)} classes"
            f" ({show_value(', '.join(names))}); correct it"
        )
    return names[value]
