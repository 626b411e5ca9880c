"""Finding the layers of a model."""

from __future__ import annotations

import math

from torch import nn

from .schema import UserError


def find_layers(module: nn.Module, depth: int, what: str) -> nn.ModuleList:
    """Find the list of a model's layers: the outermost module list of this length.

    Args:
        module: An encoder or a language model.
        depth: Number of its layers.
        what: Its name in the error, such as "the language model".

    Raises:
        UserError: There is no such list.
    """
    layers = None
    least_nesting = math.inf
    for name, inner in module.named_modules():
        if not isinstance(inner, nn.ModuleList) or len(inner) != depth:
            continue
        if name.count(".") < least_nesting:
            layers, least_nesting = inner, name.count(".")
    if layers is None:
        raise UserError(
            f"{what} {type(module).__name__} has no list of {depth} layers. SparseCut needs a stack"
            " of transformer blocks, as many as `num_hidden_layers`; choose another model"
        )
    return layers


def find_blocks(
    encoder: nn.Module, depth: int, lists: tuple[str, ...] = ()
) -> nn.ModuleList | list[nn.Module]:
    """Find the blocks of an encoder, over all its stages.

    Args:
        encoder: The encoder.
        depth: Number of its blocks.
        lists: The names of its lists of blocks, where there are several, from any place inside.

    Raises:
        UserError: There are none, or another number.
    """
    if not lists:
        return find_layers(encoder, depth, "the vision encoder")
    modules = {f".{name}": module for name, module in encoder.named_modules()}
    blocks = []
    for name in lists:
        found = (module for full, module in modules.items() if full.endswith(f".{name}"))
        blocks += next(found, nn.ModuleList()).children()
    if len(blocks) != depth:
        raise UserError(
            f"the vision encoder {type(encoder).__name__} has {len(blocks)} blocks in"
            f" {', '.join(lists)}, but its configuration describes {depth}; use another encoder, or"
            " another release of transformers"
        )
    return blocks
