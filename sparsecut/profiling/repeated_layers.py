"""Layers that are alike run once: what the first of them counts is added for each of the others.

It is for models of fake tensors. Layers are alike if their classes, weights' shapes and settings
are, and so are the shapes of what they are given. A layer that is not run returns empty tensors of
the right shape.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten
from torch.utils.flop_counter import FlopCounterMode
from transformers import Cache

PLACES = ("layer_idx", "layer_id", "layer_number", "layer_index")  # they differ in all layers
PLAIN = (bool, int, float, str, type(None))
_counters: list[LayerCounter] = []  # those whose `with` block is running
_keepers: list[KeptBytes] = []


class NoModules(contextlib.nullcontext):
    """Stands for a counter's tracker of modules, where only the sum is wanted."""

    parents = frozenset({"Global"})


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

    @contextlib.contextmanager
    def forget(self) -> Iterator[None]:
        """Count nothing of what runs inside the block, and be in the same modules after it."""
        modules = set(self.mod_tracker.parents)
        kept = {module: dict(counts) for module, counts in self.flop_counts.items()}
        yield
        self.mod_tracker.parents = modules
        self.flop_counts.clear()
        for module, counts in kept.items():
            self.flop_counts[module].update(counts)

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
        output: Its outputs, tensors cut off from their graph.
        structure: Of the outputs.
        with_gradient: Numbers of its outputs that a backward pass goes through.
        flops: What it added to each counter, by operation.
        cached: What it left in its place of the cache.
        backward_flops: What its backward pass adds to a counter, by operation.
        inputs_kept: Numbers of its inputs that were kept for a backward pass.
        outputs_kept: Numbers of its outputs that were.
        inner_bytes: Bytes that were kept of what it made inside.
    """

    output: list
    structure: Any
    with_gradient: list[int]
    flops: list[dict]
    cached: Any = None
    backward_flops: dict = field(default_factory=dict)
    inputs_kept: list[int] = field(default_factory=list)
    outputs_kept: list[int] = field(default_factory=list)
    inner_bytes: int = 0


@dataclass
class _Layer:
    """A layer whose forward is replaced.

    Attributes:
        kind: What it has in common with layers that are alike.
        place: Its number among the layers, and so its place in a cache.
        forward: What it runs by itself.
        parameters: All of it.
    """

    kind: int
    place: int
    forward: Callable
    parameters: list[nn.Parameter]


def run_alike_layers_once(layers: Iterable[nn.Module]) -> None:
    """Let layers that are alike run once for all; call it where nothing is computed.

    What a layer has done is known as long as the layers are, also to other models that share them.

    Args:
        layers: The layers of one stack, which are changed.
    """
    seen: dict[tuple, _Seen | None] = {}
    kinds: dict[tuple, int] = {}
    for place, module in enumerate(layers):
        kind = kinds.setdefault(_describe_layer(module), len(kinds))
        forward = module.forward
        inner = forward.args[-1] if isinstance(forward, functools.partial) else forward
        layer = _Layer(kind, place, inner, list(module.parameters()))
        run = functools.partial(_run_or_repeat, seen, layer)
        if isinstance(forward, functools.partial):  # it may skip the layer, for reasons of its own
            run = functools.partial(forward.func, *forward.args[:-1], run)
        module.forward = run


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


def _describe_cached(cache: Any, place: int) -> tuple:
    """What a cache holds of a layer: shapes, and numbers such as how many tokens it has seen."""
    layers = getattr(cache, "layers", None) or ()
    if place >= len(layers):
        return ()
    return tuple((name, _describe_value(value)) for name, value in vars(layers[place]).items())


def _collect_leaves(value: Any, leaves: list) -> Any:
    """Add all that plain containers hold to `leaves`, and return how they hold it."""
    if isinstance(value, dict):
        return tuple((name, _collect_leaves(inner, leaves)) for name, inner in value.items())
    if isinstance(value, tuple | list):
        return tuple(_collect_leaves(inner, leaves) for inner in value)
    leaves.append(value)
    return None


def _run_or_repeat(seen: dict, layer: _Layer, *args, **kwargs):
    """Run a layer, or repeat what one that is alike has done."""
    inputs: list = []
    structure = _collect_leaves((args, kwargs), inputs)
    cache = next((value for value in inputs if isinstance(value, Cache)), None)
    given = tuple(_describe_value(value) for value in inputs)
    learns = torch.is_grad_enabled()
    state = len(_counters), len(_keepers), structure, _describe_cached(cache, layer.place)
    trained = tuple(p.requires_grad for p in layer.parameters) if learns else None
    key = layer.kind, given, trained, state
    if key not in seen:
        seen[key] = None
        output, seen[key] = _run_first(layer, inputs, cache, args, kwargs)
        return output
    first = seen[key]
    if first is None:  # the layer runs inside itself
        return layer.forward(*args, **kwargs)
    if cache is not None and first.cached is None:  # a cache of a form that every layer writes
        return layer.forward(*args, **kwargs)
    return _repeat(first, layer, inputs, cache)


def _run_first(layer: _Layer, inputs: list, cache: Any, args: tuple, kwargs: dict) -> tuple:
    before = [counter.get_counts() for counter in _counters]
    keeper = _keepers[-1] if _keepers else None
    kept_before = set(keeper.kept) if keeper else set()
    if keeper:
        keeper.touched = {}
    result = layer.forward(*args, **kwargs)
    output, structure = tree_flatten(result)
    with_gradient = [n for n, v in enumerate(output) if isinstance(v, Tensor) and v.requires_grad]
    flops = [_subtract(c.get_counts(), old) for c, old in zip(_counters, before, strict=True)]
    without_graph = [value.detach() if isinstance(value, Tensor) else value for value in output]
    first = _Seen(without_graph, structure, with_gradient, flops)
    if keeper:
        _note_kept(first, keeper, inputs, output, kept_before)
        keeper.touched = None
    elif _counters and with_gradient:
        first.backward_flops = _count_backward(layer, args, kwargs)
    if len(getattr(cache, "layers", None) or ()) > layer.place:
        first.cached = copy.copy(cache.layers[layer.place])
    return result, first


def _subtract(counts: dict, before: dict) -> dict:
    return {operation: number - before.get(operation, 0) for operation, number in counts.items()}


def _note_kept(
    first: _Seen, keeper: KeptBytes, inputs: list, output: list, kept_before: set[int]
) -> None:
    inner = dict(keeper.touched)
    for values, numbers in ((inputs, first.inputs_kept), (output, first.outputs_kept)):
        for number, value in enumerate(values):
            if isinstance(value, Tensor) and find_storage(value) in keeper.touched:
                numbers.append(number)
                inner.pop(find_storage(value), None)
    first.inner_bytes = sum(size for key, size in inner.items() if key not in kept_before)


def _count_backward(layer: _Layer, args: tuple, kwargs: dict) -> dict:
    """FLOPs of a layer's backward pass, by operation; no counter keeps what this takes."""
    args, kwargs = tree_map_only(
        Tensor, lambda value: value.detach().requires_grad_(value.requires_grad), (args, kwargs)
    )
    with contextlib.ExitStack() as stack:
        for counter in _counters:
            stack.enter_context(counter.forget())
        output = tree_flatten(layer.forward(*args, **kwargs))[0]
        output = [value for value in output if isinstance(value, Tensor) and value.requires_grad]
        before = _counters[-1].get_counts()
        torch.autograd.backward(output, [torch.empty_like(value) for value in output])
        flops = _subtract(_counters[-1].get_counts(), before)
    for parameter in layer.parameters:
        parameter.grad = None
    return flops


class _RepeatedBackward(torch.autograd.Function):
    """Stands for a layer that is not run: its backward pass adds what the first one's takes."""

    @staticmethod
    def forward(ctx: Any, first: _Seen, *sources: Tensor) -> tuple[Tensor, ...]:
        ctx.first, ctx.sources = first, sources
        return tuple(torch.empty_like(first.output[number]) for number in first.with_gradient)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple:
        for counter in _counters:
            counter.add(ctx.first.backward_flops)
        needed = zip(ctx.sources, ctx.needs_input_grad[1:], strict=True)
        return None, *(torch.empty_like(source) if need else None for source, need in needed)


def _repeat(first: _Seen, layer: _Layer, inputs: list, cache: Any) -> Any:
    for counter, counts in zip(_counters, first.flops, strict=True):
        counter.add(counts)
    output = _make_output(first, layer, inputs) if torch.is_grad_enabled() else first.output
    if _keepers:
        keeper = _keepers[-1]
        for number in first.inputs_kept:
            keeper.keep(inputs[number])
        for number in first.outputs_kept:
            keeper.keep(output[number])
        keeper.more += first.inner_bytes
    if cache is not None:
        while len(cache.layers) <= layer.place:
            cache.layers.append(copy.copy(first.cached))
        cache.layers[layer.place] = copy.copy(first.cached)
    return tree_unflatten(output, first.structure)


def _make_output(first: _Seen, layer: _Layer, inputs: list) -> list:
    """Outputs of storages of their own; a backward pass goes through those that have a gradient."""
    output = []
    for number, value in enumerate(first.output):
        is_made = isinstance(value, Tensor) and number not in first.with_gradient
        output.append(torch.empty_like(value) if is_made else value)
    if first.with_gradient:
        sources = [value for value in inputs if isinstance(value, Tensor) and value.requires_grad]
        sources = sources or [
            parameter for parameter in layer.parameters if parameter.requires_grad
        ]
        linked = _RepeatedBackward.apply(first, *sources)
        for number, value in zip(first.with_gradient, linked, strict=True):
            output[number] = value
    return output
