"""YAML read strictly: a key that is written twice is refused."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path
from typing import Any

import yaml

from ..schema import UserError, read_text_file

logger = logging.getLogger(__name__)

MOST_VALUES = 100_000  # of a file; the largest that ships holds some hundreds
BAD_SCALARS = (ValueError, TypeError, AttributeError)  # PyYAML's at dates and numbers with faults


class _Loader(yaml.SafeLoader):
    """Reads 1e-3 as a number, as YAML 1.2 does, and refuses a key that is written twice."""

    def construct_mapping(self, node, deep=False):
        keys = []
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":  # `<<: *base` is not a key
                continue
            key = self.construct_object(key_node, deep=True)
            if key in keys:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is written twice", node.start_mark
                )
            keys.append(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def read_yaml(text: str, name: str) -> Any:
    """Return what a YAML text holds.

    Args:
        text: The text.
        name: Names the text at the start of errors.

    Raises:
        UserError: It is not YAML, or holds more than a person writes: values inside themselves,
            or over `MOST_VALUES` of them once its aliases (`*name`) are filled in.
    """
    try:
        values = yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, *BAD_SCALARS) as error:
        problem = " ".join(str(error).split())
        raise UserError(f"{name} is not valid YAML: {problem}") from None
    except RecursionError:
        raise UserError(f"{name} is nested too deeply; write fewer lists inside lists") from None
    _check_size(values, name)
    return values


def _check_size(values: Any, name: str) -> None:
    """Raise UserError where values hold themselves, or aliases multiply them without end."""
    waiting = [values]
    for _ in range(MOST_VALUES):
        if not waiting:
            return
        value = waiting.pop()
        if isinstance(value, dict):
            waiting.extend(value.values())
        elif isinstance(value, list):
            waiting.extend(value)
    raise UserError(
        f"{name} holds over {MOST_VALUES:,} values, or a value that holds itself; use fewer aliases"
        " (*name)"
    )


def read_yaml_file(path: str | Path) -> Any:
    """Return what a YAML file holds; UserError where it cannot be read or is not YAML."""
    return read_yaml(read_text_file(path), str(path))


def read_yaml_values(path: str | Path) -> dict:
    """Return the keys and values of a YAML file; UserError where it holds anything else."""
    values = read_yaml_file(path)
    if not isinstance(values, dict):
        raise UserError(
            f"{path} holds {str(values)[:40]!r}, but keys and values are needed; mend it, or remove"
            " it and make it again"
        )
    return values


def rename_key(plain: Any, old: str, new: str, name: str) -> Any:
    """Return keys and values with an old name of a key replaced; one line is logged.

    Args:
        plain: The keys and values.
        old: A key's old name.
        new: Its name now.
        name: Names the file in the line and in an error.

    Raises:
        UserError: Both names are there.
    """
    if not isinstance(plain, dict) or old not in plain:
        return plain
    if new in plain:
        raise UserError(f"{name} has both {new} and {old}, its old name; remove {old}")
    logger.warning("%s: the key `%s` is now called `%s`", name, old, new)
    return {new if key == old else key: value for key, value in plain.items()}


def expand_path(text: str) -> str:
    """Return a path with its environment variables and `~` filled in.

    Raises:
        UserError: An environment variable is not set.
    """
    expanded = os.path.expanduser(os.path.expandvars(text))
    missing = re.search(r"\$\{?(\w+)", expanded)
    if missing:
        raise UserError(
            f"the path {text} names the environment variable {missing[1]}, which is not set;"
            f" set it first (export {missing[1]}=...) or write the path in full"
        )
    return expanded


def dump_yaml(values: Any) -> str:
    """Return a YAML text of plain values; `read_yaml` reads equal values from it."""
    options = {"sort_keys": False, "width": 110}
    text = yaml.safe_dump(values, allow_unicode=True, **options)
    if yaml.load(text, Loader=_Loader) != values:  # rare characters that PyYAML takes for breaks
        text = yaml.safe_dump(values, allow_unicode=False, **options)
    return text


def to_lists(value: Any) -> Any:
    """Return keys and values with lists in place of tuples, as YAML is written."""
    if isinstance(value, dict):
        return {key: to_lists(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_lists(item) for item in value]
    return value
