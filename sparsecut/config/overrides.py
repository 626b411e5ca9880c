"""Single values of a recipe or a study replaced, as by "stages.0.args.max_steps=10"."""

from __future__ import annotations

from typing import Any

from ..schema import UserError, nearest
from .yaml_io import read_yaml

# Keys that an override may create, because a recipe may leave them out.
OPTIONAL_KEYS = ("args", "lr", "weight_decay", "lora", "chat_template_kwargs")


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
