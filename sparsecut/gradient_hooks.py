"""The hooks by which transformers lets embeddings require a gradient, mended and removed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn


def take_tuples(model: nn.Module) -> None:
    """Let the hooks of `enable_input_require_grads` take embeddings that return tuples.

    Those of Swin, Hiera and data2vec do; transformers' own hooks raise there.
    """
    for hook in model._require_grads_hooks:
        hook.hooks_dict_ref()[hook.id] = _require_gradient


def _require_gradient(module: Any, args: Any, output: Any) -> None:
    first = output[0] if isinstance(output, tuple) else output
    first.requires_grad_(True)


def remove_gradient_hooks(model: nn.Module, parameters: Iterable[nn.Parameter]) -> None:
    """Undo `enable_input_require_grads` on modules that hold nothing but these parameters."""
    frozen = {id(p) for p in parameters}
    hook_tables = set()
    for module in model.modules():
        held = [id(p) for p in module.parameters()]
        if held and frozen.issuperset(held):
            hook_tables.add(id(module._forward_hooks))
    for hook in model._require_grads_hooks:
        if id(hook.hooks_dict_ref()) in hook_tables:
            hook.remove()
