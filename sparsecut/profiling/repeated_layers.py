"""Layers that are alike run once: what the first of them counts is added for each of the others.

It is for models of fake tensors. Layers are alike if their classes, weights' shapes and settings
are, and so are the shapes of what they are given. A layer that is not run returns empty tensors of
the right shape.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.flop_counter import FlopCounterMode
from transformers import Cache

PLACES = ("layer_idx", "layer_id", "layer_number", "layer_index")  # they differ in all layers
PLAIN = (bool, int, float, str, type(None))
_counters: list[LayerCounter] = []  # those whose `with` block is running
_keepers: list[KeptBytes] = []


class LayerCounter(FlopCounterMode):
    """A counter of FLOPs that repeated layers can add to."""

    def __enter__(self):
        _counters.append(self)
        return super().__enter__()

    def __exit__(self, *error):
        _counters.remove(self)
        return super().__exit__(*error)

    def get_counts(self) -> dict[Any, int]:
        """FLOPs so far, by operation."""
        return dict(self.flop_counts["Global"])

    def add(self, counts: dict[Any, int]) -> None:
        """Add FLOPs to all modules that are running."""
        for module in set(self.mod_tracker.parents):
            for operation, number in counts.items():
                self.flop_counts[module][operation] += number


@dataclass
class KeptBytes:
    """What autograd keeps for a backward pass; each storage counts once.

    Attributes:
        weights: Storages of weights, which do not count.
        kept: Tensors by storage. They stay alive, so that no address is used twice.
        more: Bytes of layers that were not run.
        touched: Storages that the layer which runs has kept, whether or not they were kept before.
    """

    weights: set[int]
    kept: dict[int, Tensor] = field(default_factory=dict)
    more: int = 0
    touched: dict[int, int] | None = None

    def __enter__(self):
        _keepers.append(self)
        return self

    def __exit__(self, *error):
        _keepers.remove(self)

    def keep(self, tensor: Tensor) -> Tensor:
        """Note a tensor that is kept; it is returned."""
        storage = find_storage(tensor)
        if storage not in self.weights:
            self.kept[storage] = tensor
            if self.touched is not None:
                self.touched[storage] = tensor.untyped_storage().nbytes()
        return tensor

    def count(self) -> int:
        """Bytes of all."""
        return self.more + sum(t.untyped_storage().nbytes() for t in self.kept.values())


def find_storage(tensor: Tensor) -> int:
    """What tells a tensor's storage from others."""
    return tensor.untyped_storage()._cdata


@dataclass
class _Seen:
    """What the first of some layers that are alike did.

    Attributes:
        output: Its outputs.
        structure: Of the outputs.
        place: Its number among the layers, and so its place in the cache.
        flops: What it added to each counter, by operation.
        inputs_kept: Numbers of its inputs that were kept for a backward pass.
        outputs_kept: Numbers of its outputs that were.
        inner_bytes: Bytes that were kept of what it made inside.
    """

    output: list
    structure: Any
    place: int
    flops: list[dict]
    inputs_kept: list[int] = field(default_factory=list)
    outputs_kept: list[int] = field(default_factory=list)
    inner_bytes: int = 0


def run_alike_layers_once(layers: Iterable[nn.Module]) -> None:
    """Let layers that are alike run once for all; call it where nothing is computed.

    Args:
        layers: The layers of one stack, which are changed.
    """
    seen: dict[tuple, _Seen] = {}
    for place, layer in enumerate(layers):
        kind = _describe_layer(layer)
        forward = layer.forward
        inner = forward.args[-1] if isinstance(forward, functools.partial) else forward
        run = functools.partial(_run_or_repeat, seen, kind, place, inner)
        if isinstance(forward, functools.partial):  # it may skip the layer, for reasons of its own
            run = functools.partial(forward.func, *forward.args[:-1], run)
        layer.forward = run


def _describe_layer(layer: nn.Module) -> tuple:
    """All that makes layers alike: classes, plain settings and weights of all their modules."""
    facts = []
    for name, module in layer.named_modules():
        settings = [
            (key, value)
            for key, value in vars(module).items()
            if isinstance(value, PLAIN) and key not in PLACES
        ]
        facts.append((name, type(module), tuple(sorted(settings, key=lambda pair: pair[0]))))
    for name, tensor in (*layer.named_parameters(), *layer.named_buffers()):
        facts.append((name, tuple(tensor.shape), tensor.dtype))
    return tuple(facts)


def _describe_value(value: Any) -> Any:
    if isinstance(value, Tensor):
        return tuple(value.shape), value.dtype, value.requires_grad
    return value if isinstance(value, PLAIN) else type(value)


def _run_or_repeat(seen: dict, kind: tuple, place: int, forward, *args, **kwargs):
    """Run a layer, or repeat what one that is alike has done."""
    inputs, structure = tree_flatten((args, kwargs), is_leaf=lambda value: isinstance(value, Cache))
    cache = next((value for value in inputs if isinstance(value, Cache)), None)
    if cache is not None and place and not getattr(cache, "layers", None):
        return forward(*args, **kwargs)  # a cache of another form holds what every layer writes
    given = tuple(_describe_value(value) for value in inputs)
    state = torch.is_grad_enabled(), len(_counters), len(_keepers), str(structure)
    trained = tuple(p.requires_grad for p in forward.__self__.parameters())
    key = kind, given, state, trained
    if key not in seen:
        seen[key] = None
        output, seen[key] = _run_first(place, forward, inputs, args, kwargs)
        return output
    if seen[key] is None:  # the layer runs inside itself
        return forward(*args, **kwargs)
    return _repeat(seen[key], inputs, cache, place)


def _run_first(place: int, forward, inputs: list, args: tuple, kwargs: dict) -> tuple:
    before = [counter.get_counts() for counter in _counters]
    keeper = _keepers[-1] if _keepers else None
    kept_before = set(keeper.kept) if keeper else set()
    if keeper:
        keeper.touched = {}
    result = forward(*args, **kwargs)
    output, structure = tree_flatten(result)
    flops = []
    for counter, counts in zip(_counters, before, strict=True):
        after = counter.get_counts()
        flops.append({op: number - counts.get(op, 0) for op, number in after.items()})
    first = _Seen(output, structure, place, flops)
    if keeper:
        _note_kept(first, keeper, inputs, kept_before)
        keeper.touched = None
    return result, first


def _note_kept(first: _Seen, keeper: KeptBytes, inputs: list, kept_before: set[int]) -> None:
    inner = dict(keeper.touched)
    for values, numbers in ((inputs, first.inputs_kept), (first.output, first.outputs_kept)):
        for number, value in enumerate(values):
            if isinstance(value, Tensor) and find_storage(value) in keeper.touched:
                numbers.append(number)
                inner.pop(find_storage(value), None)
    first.inner_bytes = sum(size for key, size in inner.items() if key not in kept_before)


def _repeat(first: _Seen, inputs: list, cache: Any, place: int) -> Any:
    output = []
    for value in first.output:
        if isinstance(value, Tensor):
            needs_gradient = value.requires_grad
            value = torch.empty_like(value, requires_grad=needs_gradient)
            if needs_gradient:  # features may be added in place, which a leaf does not take
                value = value + 0
        output.append(value)
    for counter, counts in zip(_counters, first.flops, strict=True):
        counter.add(counts)
    if _keepers:
        keeper = _keepers[-1]
        for number in first.inputs_kept:
            keeper.keep(inputs[number])
        for number in first.outputs_kept:
            keeper.keep(output[number])
        keeper.more += first.inner_bytes
    if cache is not None:
        while len(cache.layers) <= place:
            cache.layers.append(copy.copy(cache.layers[first.place]))
        cache.layers[place] = copy.copy(cache.layers[first.place])
    return tree_unflatten(output, first.structure)
