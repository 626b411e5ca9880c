"""YAML read strictly, and single values in it replaced by dotted overrides such as
"stages.0.args.max_steps=10".
"""

from __future__ import annotations

import logging
import os
import re

import yaml

from ..schema import UserError, nearest

logger = logging.getLogger(__name__)

BACKBONES = "shapes"  # the built-in small encoder and language model
OLD_BACKBONES = "world"  # their former name
OPEN = (
    "args",
    "lr",
    "weight_decay",
    "lora",
)  # keys that an override may create, because a recipe may leave them out


class _Loader(yaml.SafeLoader):
    """YAML that reads 1e-3 as a number (as YAML 1.2 does) and refuses a key that is written
    twice.
    """

    def construct_mapping(self, node, deep=False):
        written = [
            key for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"
        ]  # `<<: *base` is not a key
        keys = [self.construct_object(key, deep=True) for key in written]
        if twice := [key for i, key in enumerate(keys) if key in keys[:i]]:
            raise yaml.constructor.ConstructorError(
                None, None, f"the key {twice[0]!r} is written twice", node.start_mark
            )
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def read_yaml(text: str, name: str):
    """What a YAML text holds; `name` stands at the start of the ValueError for a text that is not
    YAML.
    """
    try:
        return _rename_backbones(yaml.load(text, Loader=_Loader))
    except yaml.YAMLError as error:
        raise UserError(f"{name} is not valid YAML: {' '.join(str(error).split())}") from None


def _rename_backbones(node):
    """The same tree, its built-in backbones under their present name."""
    if isinstance(node, list):
        return [_rename_backbones(item) for item in node]
    if not isinstance(node, dict):
        return node
    renamed = {key: _rename_backbones(value) for key, value in node.items()}
    for part in ("vision", "language"):
        if renamed.get(part) == OLD_BACKBONES:
            logger.warning("%s: %s is now called %s: %s", part, OLD_BACKBONES, part, BACKBONES)
            renamed[part] = BACKBONES
    return renamed


def override(plain, change: str):
    """A copy of the tree with one value replaced by "key.key=value"; ValueError where that hits
    nothing.

    A new last key is accepted here, and left to the checks that every recipe passes.
    """
    dotted, equals, text = change.partition("=")
    if not equals or not dotted:
        raise UserError(
            f"the override {change!r} is not written as key=value; write for example seed=1"
        )
    return _replace(plain, dotted.split("."), read_yaml(text, f"override {change!r}"), change, "")


def _replace(node, keys: list[str], value, change: str, at: str):
    if not keys:
        return value
    key, place = keys[0], f"{at}.{keys[0]}" if at else keys[0]
    if isinstance(node, list):
        if not key.isdigit() or int(key) >= len(node):
            raise UserError(
                f"the override {change!r} hits nothing: {at} is a list with places 0 to"
                f" {len(node) - 1}"
            )
        new = _replace(node[int(key)], keys[1:], value, change, place)
        return [*node[: int(key)], new, *node[int(key) + 1 :]]
    if not isinstance(node, dict):
        raise UserError(
            f"the override {change!r} hits nothing: {at or 'the recipe'} is {node!r}, which has no"
            " keys"
        )
    if len(keys) > 1 and key not in node and key not in OPEN:
        raise UserError(
            f"the override {change!r} hits nothing: the recipe has no {place}{nearest(key, node)}; "
            f"there {'is' if len(node) == 1 else 'are'} {', '.join(map(str, node))}"
        )
    return {**node, key: _replace(node.get(key, {}), keys[1:], value, change, place)}


def expand_path(text: str) -> str:
    """A path with its environment variables and `~` filled in; ValueError for a variable that is
    not set.
    """
    expanded = os.path.expanduser(os.path.expandvars(text))
    if missing := re.search(r"\$\{?(\w+)", expanded):
        raise UserError(
            f"the path {text} names the environment variable {missing[1]}, which is not set; "
            f"set it first (export {missing[1]}=...) or write the path in full"
        )
    return expanded


def plain_lists(value):
    """Keys and values with lists where tuples were, as YAML is written."""
    if isinstance(value, dict):
        return {key: plain_lists(item) for key, item in value.items()}
    return [plain_lists(item) for item in value] if isinstance(value, list | tuple) else value
