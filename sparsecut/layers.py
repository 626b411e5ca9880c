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
