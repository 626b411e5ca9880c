"""Where the method meets somebody else's modules: reading taps of an encoder, adding features
before decoder layers.

Both use permanent hooks that look into a compile-aware context variable and do nothing while it is empty. A hook is not
a wrapper: names of weights, checkpoints, `generate` and the layers' own code stay as they are. Everything that leans on
the inner structure of transformers stands in this file.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from transformers.utils.output_capturing import CompileableContextVar

from .encoders import FEEDS, PatchGrid, encoder_inputs, to_raster_order
from .schema import UserError


@dataclass
class TapCapture:
    """One pass through an encoder: the wanted taps, and those found so far."""

    wanted: frozenset[int]
    taps: dict[int, Tensor] = field(default_factory=dict)
    as_tuple: bool = False  # what this encoder's blocks return, for the blocks that are skipped
    whole: bool = False  # all blocks run, because somebody else reads the encoder's output

    @property
    def num_blocks(self) -> float:
        """Blocks that run: as far as the deepest tap, and at least one, which shows what blocks
        return here.
        """
        return math.inf if self.whole else max(1, *self.wanted)


@dataclass
class Injection:
    """One pass through a decoder: which positions are image tokens, what to add there, and what has
    been added.
    """

    mask: Tensor  # [batch, length], true at image tokens
    features: Mapping[int, Tensor]  # layer -> [number of true positions, H]
    gates: Mapping[
        int, Callable
    ]  # layer -> (hidden states there, features) -> what is added; for few plans
    fired: list[int] = field(default_factory=list)
    rows: Tensor | None = (
        None  # [batch * length]: which feature stands at each position; any at positions without
    )


# Each holds a dict with one entry, or nothing: transformers' own variables of this class hold
# dicts, and its tests read keys.
_reading = CompileableContextVar("sparsecut_reading")
_injection = CompileableContextVar("sparsecut_injection")
_observers: list[Callable] = []  # of training, which has one pass at a time


def _current_reading() -> TapCapture | None:
    return None if (held := _reading.get()) is None else held["reading"]


def _current_injection() -> Injection | None:
    return None if (held := _injection.get()) is None else held["injection"]


def find_layers(module: nn.Module, depth: int, what: str) -> nn.ModuleList:
    """The module list that holds the `depth` layers of `module`: the outermost one of that
    length.
    """
    lists = [
        (name, m)
        for name, m in module.named_modules()
        if isinstance(m, nn.ModuleList) and len(m) == depth
    ]
    if not lists:
        raise UserError(
            f"{what} {type(module).__name__} has no list of {depth} layers that features could be"
            " read from or added to; SparseCut needs a stack of transformer blocks as long as"
            " `num_hidden_layers`, so choose another model"
        )
    return min(lists, key=lambda item: item[0].count("."))[1]


def known_arguments(module: nn.Module) -> set[str]:
    """Names of the parameters of a module's forward."""
    return set(inspect.signature(type(module).forward).parameters)


def accepts(module: nn.Module, name: str, *, by_name: bool = False) -> bool:
    """Whether a module's forward takes this argument; by_name: and lists it, instead of passing on
    what it does not know.
    """
    return bool(known_arguments(module) & ({name} if by_name else {name, "kwargs"}))


def check_vision_tower(module: nn.Module, grid: PatchGrid) -> None:
    """Refuse an encoder that needs more than is made of views for its grid, before anything is
    connected to it.
    """
    parameters = list(inspect.signature(type(module).forward).parameters.values())[2:]
    needed = [
        p.name
        for p in parameters
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    if needed and FEEDS[grid.kind] is FEEDS["plain"]:
        raise UserError(
            f"{type(module).__name__} needs {' and '.join(needed)} besides pixels, which is not"
            " known to be made of views; use an encoder such as CLIP, SigLIP, ViT, DINOv2, Pixtral"
            " or Qwen2-VL's"
        )


def check_language_model(module: nn.Module) -> None:
    """Refuse a language model that cannot be given embeddings and a cache, before anything is
    connected to it.
    """
    if missing := {"inputs_embeds", "past_key_values"} - known_arguments(module):
        raise UserError(
            f"{type(module).__name__} does not take {' or '.join(sorted(missing))}, which feeding"
            " image features and generating need; use a decoder-only transformer such as Llama,"
            " Qwen or Mistral"
        )


def whole_modules(model: nn.Module) -> set[str]:
    """Of the classes that are never split between devices (`_no_split_modules`) those that the
    model has: FSDP refuses others.
    """
    return set(model._no_split_modules or ()) & {
        type(module).__name__ for module in model.modules()
    }


def connect_encoder(encoder: nn.Module, depth: int) -> None:
    """Hook every block, so that `read_taps` can keep any tap and end at the deepest one it wants.

    The hooks know no plan: models with other plans may share the encoder, and connecting again only
    renews the hooks.
    """
    for number, block in enumerate(find_layers(encoder, depth, "the vision encoder")):
        _disconnect(block)
        if number == 0:
            block.register_forward_pre_hook(_read_embeddings, with_kwargs=True)
        block.register_forward_hook(partial(_read_block, number + 1))
        block.forward = partial(_skip_while_reading, number, block.forward)


def connect_decoder(language_model: nn.Module, depth: int) -> None:
    """Hook every decoder layer, so that `inject` can add features before any; connecting again only
    renews the hooks.
    """
    for number, layer in enumerate(find_layers(language_model, depth, "the language model")):
        _disconnect(layer)
        layer.register_forward_pre_hook(partial(_add_features, number), with_kwargs=True)


def disconnect(module: nn.Module) -> None:
    """Take every hook of ours off an encoder or a language model, which then is as it was
    before.
    """
    for layer in module.modules():
        _disconnect(layer)


def _disconnect(layer: nn.Module) -> None:
    ours = (_read_embeddings, _read_block, _add_features)
    for hooks in (layer._forward_pre_hooks, layer._forward_hooks):
        for key in [key for key, hook in hooks.items() if getattr(hook, "func", hook) in ours]:
            del hooks[key]
            layer._forward_pre_hooks_with_kwargs.pop(key, None)
    if getattr(layer.forward, "func", None) is _skip_while_reading:
        forward = layer.forward.args[1]
        if getattr(forward, "__func__", None) is type(layer).forward:
            del layer.forward  # the class's own again, and nothing left on the layer
        else:
            layer.forward = forward


def read_taps(
    encoder: nn.Module, views: Tensor, grid: PatchGrid | int, wanted: Iterable[int]
) -> dict[int, Tensor]:
    """Run the encoder on views [views, *grid.view] and return tap -> [views, N, D], row by row,
    prefix tokens removed.

    grid: the encoder's, or N alone for one that takes its views as they are. Raises ValueError for
    states of another grid.
    """
    grid = PatchGrid("plain", (), 1, grid, 0, (1, 1)) if isinstance(grid, int) else grid
    reading = TapCapture(frozenset(wanted))
    token = _reading.set({"reading": reading})
    try:
        encoder(**encoder_inputs(grid, views))
    finally:
        _reading.reset(token)
    if missing := sorted(reading.wanted - set(reading.taps)):
        raise RuntimeError(
            f"taps {missing} were not reached in {type(encoder).__name__}: its blocks are not the"
            " ones that were connected; connect the encoder again after replacing modules in it"
        )
    return {tap: to_raster_order(grid, states, len(views)) for tap, states in reading.taps.items()}


def capture_taps(run: Callable, wanted: Iterable[int]) -> tuple[object, dict[int, Tensor]]:
    """Call `run()`, which passes once through a connected encoder, and return its result and tap ->
    states as blocks give them.
    """
    reading = TapCapture(frozenset(wanted), whole=True)
    token = _reading.set({"reading": reading})
    try:
        return run(), reading.taps
    finally:
        _reading.reset(token)


def inject(
    run: Callable,
    mask: Tensor,
    features: Mapping[int, Tensor],
    gates: Mapping[int, Callable] | None = None,
    *,
    later: bool = False,
):
    """Call `run()` while `features` (layer -> [tokens, H]) are added at the true positions of
    `mask` [batch, length].

    gates: for some layers, what makes the addition from the hidden states at those positions and
    the features. later: `run` itself puts features in, before its decoder. Every layer must receive
    its features exactly once, else RuntimeError: a silent miss is the one thing this must not do.
    """
    injection = Injection(mask, features, gates or {})
    if features or later:
        injection.rows = (mask.flatten().cumsum(0) - 1).clamp(min=0)
    token = _injection.set({"injection": injection})
    try:
        output = run()
    finally:
        _injection.reset(token)
    if not torch.compiler.is_compiling() and sorted(injection.fired) != sorted(features):
        raise RuntimeError(
            f"shortcuts into layers {sorted(features)} should each fire once, but layers"
            f" {sorted(injection.fired)} fired; a decoder layer was skipped, repeated or replaced:"
            " connect the language model again after replacing modules in it"
        )
    return output


@contextmanager
def observe_injections(see: Callable) -> Iterator[None]:
    """Inside the block, `see(layer, hidden states at image tokens, what is added to them)` is
    called for every addition.
    """
    _observers.append(see)
    try:
        yield
    finally:
        _observers.remove(see)


def _read_embeddings(module, args, kwargs):
    if (reading := _current_reading()) is not None and 0 in reading.wanted:
        reading.taps[0] = args[0] if args else kwargs["hidden_states"]


def _read_block(tap: int, module, args, output):
    if (reading := _current_reading()) is not None and tap <= reading.num_blocks:
        reading.as_tuple = isinstance(output, tuple)
        if tap in reading.wanted:
            reading.taps[tap] = output[0] if reading.as_tuple else output


def _skip_while_reading(number: int, forward: Callable, *args, **kwargs):
    reading = _current_reading()
    if reading is None or number < reading.num_blocks:
        return forward(*args, **kwargs)
    hidden = args[0] if args else kwargs["hidden_states"]
    return (hidden,) if reading.as_tuple else hidden


def _add_features(layer: int, module, args, kwargs):
    injection = _current_injection()
    if injection is None or layer not in injection.features:
        return None
    hidden = args[0] if args else kwargs["hidden_states"]
    mask, features = injection.mask.to(hidden.device), injection.features[layer].to(hidden.device)
    if layer in injection.gates:
        features = injection.gates[layer](hidden[mask], features)
    for see in _observers:
        see(layer, hidden[mask], features)
    # Out of place, and on the layer's own device: in-place sums break autograd and recorded hidden
    # states.
    spread = features.to(hidden).index_select(0, injection.rows.to(hidden.device)).view_as(hidden)
    hidden = torch.where(mask.unsqueeze(-1), hidden + spread, hidden)
    injection.fired.append(layer)
    return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})


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
