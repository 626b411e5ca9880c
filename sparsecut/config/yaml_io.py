"""YAML read strictly, and single values in it replaced by dotted overrides.

An override is a text such as "stages.0.args.max_steps=10".
"""

from __future__ import annotations

import logging
import os
import re
from typing import Any

import yaml

from ..schema import UserError, nearest

# Keys that an override may create, because a recipe may leave them out.
OPTIONAL_KEYS = ("args", "lr", "weight_decay", "lora")
logger = logging.getLogger(__name__)


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
    """Return what a YAML text holds; UserError, which starts with `name`, where it is not YAML."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        problem = " ".join(str(error).split())
        raise UserError(f"{name} is not valid YAML: {problem}") from None


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


def override(plain: Any, change: str) -> Any:
    """Return a copy of a tree with one value replaced.

    A new last key is accepted here; the checks of the whole file may refuse it.

    Args:
        plain: Dicts and lists, as YAML holds them.
        change: The change, such as "stages.0.args.max_steps=10". The value is read as YAML.

    Raises:
        UserError: The change is malformed, or its place is not in the tree.
    """
    dotted, equals, text = change.partition("=")
    if not equals or not dotted:
        raise UserError(
            f"the override {change!r} is not written as key=value; write for example seed=1"
        )
    value = read_yaml(text, f"override {change!r}")
    try:
        return _replace(plain, dotted.split("."), value)
    except UserError as error:
        raise UserError(f"the override {change!r} has no effect: {error}") from None


def _replace(node: Any, keys: list[str], value: Any, place: str = "") -> Any:
    if not keys:
        return value
    key, *rest = keys
    inner_place = f"{place}.{key}" if place else key
    if isinstance(node, list):
        if not key.isdigit() or int(key) >= len(node):
            raise UserError(f"{place} is a list with places 0 to {len(node) - 1}")
        index = int(key)
        return [*node[:index], _replace(node[index], rest, value, inner_place), *node[index + 1 :]]
    if not isinstance(node, dict):
        raise UserError(f"{place or 'the recipe'} is {node!r}, which has no keys")
    if rest and key not in node and key not in OPTIONAL_KEYS:
        raise UserError(
            f"there is no {inner_place}{nearest(key, node)}; the keys there are"
            f" {', '.join(map(str, node))}"
        )
    return {**node, key: _replace(node.get(key, {}), rest, value, inner_place)}


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


def to_lists(value: Any) -> Any:
    """Return keys and values with lists in place of tuples, as YAML is written."""
    if isinstance(value, dict):
        return {key: to_lists(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_lists(item) for item in value]
    return value
