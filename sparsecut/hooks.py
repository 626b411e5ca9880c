"""Hooks on foreign modules: reading taps of an encoder, adding features before decoder layers.

The hooks are permanent. Each looks into a context variable that torch.compile knows, and does
nothing while it is empty. A hook is not a wrapper: weights, checkpoints, `generate` and the layers'
own code stay as they are. Everything that depends on the inner structure of transformers is in this
file.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils.output_capturing import CompileableContextVar

from .encoders import PatchGrid, encoder_inputs, takes_plain_views, to_raster_order
from .layers import find_blocks, find_layers
from .schema import UserError
from .staged_encoders import make_skipped_states


@dataclass
class TapCapture:
    """One pass through an encoder.

    Attributes:
        wanted: The taps to capture.
        taps: Those captured so far: tap -> states as the block returns them.
        num_outputs: Length of the tuples that this encoder's blocks return, 0 for a state alone.
            Skipped blocks return the same.
        runs_all_blocks: All blocks run, because the encoder's own output is needed too.
        grid: The encoder's grid, where it decides what skipped blocks return.
    """

    wanted: frozenset[int]
    taps: dict[int, Tensor] = field(default_factory=dict)
    num_outputs: int = 0
    runs_all_blocks: bool = False
    grid: PatchGrid | None = None

    @property
    def num_blocks(self) -> float:
        """Number of blocks that run, at least one: it shows what blocks return here."""
        return math.inf if self.runs_all_blocks else max(1, *self.wanted)


@dataclass
class Injection:
    """One pass through a decoder.

    Attributes:
        mask: Where image tokens are, [batch, length].
        features: What to add there: layer -> [image tokens, H].
        gates: For few plans: layer -> (hidden states, features) -> what is added.
        fired: Layers whose features have been added.
        rows: Row of `features` for each position, [batch * length]; any row without an image token.
    """

    mask: Tensor
    features: Mapping[int, Tensor]
    gates: Mapping[int, Callable]
    fired: list[int] = field(default_factory=list)
    rows: Tensor | None = None


# Each holds a dict with one entry, or nothing: transformers' own variables of this class hold
# dicts, and its tests read their keys.
_capture = CompileableContextVar("sparsecut_capture")
_injection = CompileableContextVar("sparsecut_injection")
_observers: list[Callable] = []  # used in training, which has one pass at a time


def _current_capture() -> TapCapture | None:
    held = _capture.get()
    return None if held is None else held["capture"]


def _current_injection() -> Injection | None:
    held = _injection.get()
    return None if held is None else held["injection"]


# --- names that differ between releases of transformers ---

# The cache of keys and values, in arguments and outputs: 5.24 renamed it.
CACHE_NAMES = ("cache", "past_key_values")
_generation = inspect.signature(GenerationMixin.prepare_inputs_for_generation)
CACHE = next(name for name in CACHE_NAMES if name in _generation.parameters)
# Recomputing activations, in methods and training arguments: 5.23 renamed it.
CHECKPOINTING_NAMES = ("activation_checkpointing", "gradient_checkpointing")
CHECKPOINTING = next(x for x in CHECKPOINTING_NAMES if f"{x}_enable" in dir(PreTrainedModel))


def name_cache(module: nn.Module, cache: Cache | None) -> dict[str, Cache | None]:
    """The cache as a keyword argument, under the name that this module's forward has for it."""
    names = get_argument_names(module)
    return {next((name for name in CACHE_NAMES if name in names), CACHE): cache}


def get_cache(output: Mapping) -> Cache | None:
    """The cache in a model's output, under this release's name."""
    return output.get(CACHE)


def name_checkpointing(arguments: Mapping) -> dict:
    """Training arguments with checkpointing under this release's name, whatever name they use."""
    renamed = {}
    for name, value in arguments.items():
        for other in CHECKPOINTING_NAMES:
            if name in (other, f"{other}_kwargs"):
                name = name.replace(other, CHECKPOINTING)
        renamed[name] = value
    return renamed


def is_processor_argument(processor: Any, name: str) -> bool:
    """Whether a processor lists an argument: in its call, or before 5.23 in keys for its text."""
    for cls in type(processor).__mro__:
        call = vars(cls).get("__call__")
        if call is not None and name in inspect.signature(call).parameters:
            return True
    known = getattr(processor, "valid_processor_kwargs", None)
    text = getattr(known, "__annotations__", {}).get("text_kwargs")
    return name in getattr(text, "__annotations__", {})


# Since 5.23 a checkpointed layer recomputes its forward; before, it recomputed its hooks too.
RECOMPUTES_HOOKS = "__call__" in vars(GradientCheckpointingLayer)


def _connect_checkpointing(module: nn.Module, layers: nn.ModuleList | list[nn.Module]) -> None:
    if RECOMPUTES_HOOKS:
        owners = (inner for inner in module.modules() if layers in inner._modules.values())
        owner = module if isinstance(layers, list) else next(owners)
        _disconnect(owner)
        owner.register_forward_pre_hook(partial(_keep_hooks_out_of_checkpoints, layers))


def _keep_hooks_out_of_checkpoints(layers: nn.ModuleList | list[nn.Module], *_: Any) -> None:
    """Before 5.23: let checkpointed layers recompute no more than their forward, as later ones do.

    Hooks find no context when they run again in the backward pass, and what they capture inside a
    reentrant checkpoint has no gradient.
    """
    for layer in layers:
        checkpoint = getattr(layer, "_gradient_checkpointing_func", None)
        if checkpoint is not None and getattr(checkpoint, "func", None) is not _checkpoint_forward:
            layer._gradient_checkpointing_func = partial(_checkpoint_forward, layer, checkpoint)


def _checkpoint_forward(layer: nn.Module, checkpoint: Callable, call: partial, *args: Any) -> Any:
    """Run a layer's hooks and, inside a checkpoint, its own forward; `call` has its keywords."""
    forward = layer.forward
    own_forward = {name: value for name, value in vars(layer).items() if name == "forward"}
    is_ours = getattr(forward, "func", None) is _skip_above_taps
    number, inner = forward.args if is_ours else (None, forward)

    def checkpointed(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(partial(inner, **kwargs), *args)

    layer.forward = partial(_skip_above_taps, number, checkpointed) if is_ours else checkpointed
    try:
        return nn.Module.__call__(layer, *args, **call.keywords)
    finally:
        del layer.forward
        vars(layer).update(own_forward)


# --- arguments of modules ---


def get_argument_names(module: nn.Module) -> set[str]:
    """Names of the parameters of a module's forward."""
    return set(inspect.signature(type(module).forward).parameters)


def accepts(module: nn.Module, name: str, *, by_name: bool = False) -> bool:
    """Whether a module's forward takes an argument.

    Args:
        module: The module.
        name: The argument.
        by_name: It must be listed; `**kwargs` does not count.
    """
    allowed = {name} if by_name else {name, "kwargs"}
    return bool(get_argument_names(module) & allowed)


def check_vision_tower(module: nn.Module, grid: PatchGrid) -> None:
    """Raise UserError for an encoder that needs inputs that are not made of its views."""
    parameters = list(inspect.signature(type(module).forward).parameters.values())
    after_pixels = parameters[2:]
    required = []
    for parameter in after_pixels:
        is_variadic = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        if parameter.default is parameter.empty and not is_variadic:
            required.append(parameter.name)
    if required and takes_plain_views(grid):
        raise UserError(
            f"{type(module).__name__} needs {' and '.join(required)} besides pixels, which"
            " SparseCut cannot make for it; use an encoder such as CLIP, SigLIP, ViT, DINOv2,"
            " Pixtral or Qwen2-VL's"
        )


def get_unsplit_classes(model: nn.Module) -> set[str]:
    """Classes in `_no_split_modules` that the model really has: FSDP refuses others."""
    present = {type(module).__name__ for module in model.modules()}
    return set(model._no_split_modules or ()) & present


def connect_encoder(encoder: nn.Module, depth: int, lists: tuple[str, ...] = ()) -> None:
    """Hook every block, so that `read_taps` can capture any tap and stop after the deepest one.

    The hooks know no plan, so models with other plans may share the encoder. Connecting again
    replaces the hooks.

    Args:
        encoder: The encoder.
        depth: Number of its blocks.
        lists: Of encoders in stages: the names of their lists of blocks.
    """
    blocks = find_blocks(encoder, depth, lists)
    _connect_checkpointing(encoder, blocks)
    for number, block in enumerate(blocks):
        _disconnect(block)
        if number == 0:
            block.register_forward_pre_hook(_capture_embeddings, with_kwargs=True)
        block.register_forward_hook(partial(_capture_block, number + 1))
        block.forward = partial(_skip_above_taps, number, block.forward)


def connect_decoder(language_model: nn.Module, depth: int) -> None:
    """Hook every decoder layer, so that `inject` can add features before any.

    Connecting again replaces the hooks.
    """
    layers = find_layers(language_model, depth, "the language model")
    _connect_checkpointing(language_model, layers)
    for number, layer in enumerate(layers):
        _disconnect(layer)
        layer.register_forward_pre_hook(partial(_add_features, number), with_kwargs=True)


def disconnect(module: nn.Module) -> None:
    """Remove all our hooks from an encoder or a language model."""
    for layer in module.modules():
        _disconnect(layer)


def _disconnect(layer: nn.Module) -> None:
    our_hooks = (_capture_embeddings, _capture_block, _add_features, _keep_hooks_out_of_checkpoints)
    for hooks in (layer._forward_pre_hooks, layer._forward_hooks):
        ours = [key for key, hook in hooks.items() if getattr(hook, "func", hook) in our_hooks]
        for key in ours:
            del hooks[key]
            layer._forward_pre_hooks_with_kwargs.pop(key, None)
    if getattr(layer.forward, "func", None) is not _skip_above_taps:
        return
    forward = layer.forward.args[1]
    if getattr(forward, "__func__", None) is type(layer).forward:
        del layer.forward  # the class's own again, nothing left on the layer
    else:
        layer.forward = forward


def read_taps(
    encoder: nn.Module, views: Tensor, grid: PatchGrid | int, wanted: Iterable[int]
) -> dict[int, Tensor]:
    """Run a connected encoder, as far as the deepest wanted tap.

    Args:
        encoder: The encoder.
        views: [views, *grid.view].
        grid: The encoder's grid, or N alone for one that takes its views as they are.
        wanted: Taps to read.

    Returns:
        Tap -> [views, N, D], patches in raster order, without prefix tokens.

    Raises:
        UserError: The blocks return states of another grid.
        RuntimeError: A tap was not reached.
    """
    if isinstance(grid, int):
        grid = PatchGrid("plain", (), 1, grid, 0, (1, 1))
    capture = TapCapture(frozenset(wanted), grid=grid)
    token = _capture.set({"capture": capture})
    try:
        encoder(**encoder_inputs(grid, views))
    finally:
        _capture.reset(token)
    missing = sorted(capture.wanted - set(capture.taps))
    if missing:
        raise RuntimeError(
            f"taps {missing} were not reached in {type(encoder).__name__}: its blocks are not the"
            " ones that were connected. Connect the encoder again after replacing modules in it"
        )
    num_views = len(views)
    taps = capture.taps.items()
    return {tap: to_raster_order(grid, states, num_views, tap) for tap, states in taps}


def capture_taps(run: Callable, wanted: Iterable[int]) -> tuple[object, dict[int, Tensor]]:
    """Capture taps while `run()` passes once through a connected encoder.

    Returns:
        The result of `run`, and tap -> states as the blocks return them.
    """
    capture = TapCapture(frozenset(wanted), runs_all_blocks=True)
    token = _capture.set({"capture": capture})
    try:
        return run(), capture.taps
    finally:
        _capture.reset(token)


def inject(
    run: Callable,
    mask: Tensor,
    features: Mapping[int, Tensor],
    gates: Mapping[int, Callable] | None = None,
    *,
    later: bool = False,
) -> Any:
    """Add features before decoder layers while `run()` passes once through the decoder.

    Args:
        run: Calls the decoder.
        mask: Where image tokens are, [batch, length].
        features: Layer -> [image tokens, H].
        gates: For some layers, (hidden states at image tokens, features) -> what is added.
        later: `run` itself fills `features`, before its decoder.

    Returns:
        The result of `run`.

    Raises:
        RuntimeError: A layer did not receive its features exactly once. A silent miss would
            be a wrong model.
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
            f" {sorted(injection.fired)} fired: a decoder layer was skipped, repeated or replaced."
            " Connect the language model again after replacing modules in it"
        )
    return output


@contextmanager
def observe_injections(observer: Callable) -> Iterator[None]:
    """Call `observer(layer, hidden states at image tokens, what is added)` for every addition."""
    _observers.append(observer)
    try:
        yield
    finally:
        _observers.remove(observer)


def _get_hidden(args: tuple, kwargs: Mapping) -> Tensor:
    """What enters a block: its first argument, whatever the name."""
    if args:
        return args[0]
    return kwargs["hidden_states" if "hidden_states" in kwargs else "hidden_state"]


def _capture_embeddings(module: Any, args: Any, kwargs: Any) -> None:
    capture = _current_capture()
    if capture is not None and 0 in capture.wanted:
        capture.taps[0] = _get_hidden(args, kwargs)


def _capture_block(tap: int, module: Any, args: Any, output: Any) -> None:
    capture = _current_capture()
    if capture is None or tap > capture.num_blocks:
        return
    capture.num_outputs = len(output) if isinstance(output, tuple) else 0
    if tap in capture.wanted:
        capture.taps[tap] = output[0] if capture.num_outputs else output


def _skip_above_taps(number: int, forward: Callable, *args: Any, **kwargs: Any) -> Any:
    capture = _current_capture()
    if capture is None or number < capture.num_blocks:
        return forward(*args, **kwargs)
    hidden = _get_hidden(args, kwargs)
    if capture.grid is not None and capture.grid.shapes:
        shape = capture.grid.shapes[number + 1]
        hidden = make_skipped_states(hidden, shape, capture.grid.layout)
    return (hidden, *[None] * (capture.num_outputs - 1)) if capture.num_outputs else hidden


def _add_features(layer: int, module: Any, args: Any, kwargs: Any) -> Any:
    injection = _current_injection()
    if injection is None or layer not in injection.features:
        return None
    hidden = args[0] if args else kwargs["hidden_states"]
    device = hidden.device
    # Some decoders (Gemma 4) go on with the last positions alone, whose logits are wanted.
    num_positions = hidden.shape[1]
    mask = injection.mask.to(device)[:, -num_positions:]
    rows = injection.rows.to(device).view_as(injection.mask)[:, -num_positions:].flatten()
    features = injection.features[layer].to(device)
    if layer in injection.gates:
        features = injection.gates[layer](hidden[mask], features)
    for observer in _observers:
        observer(layer, hidden[mask], features)
    # Out of place, and on the layer's own device: in-place sums break autograd and recorded hidden
    # states.
    spread = features.to(hidden).index_select(0, rows).view_as(hidden)
    hidden = torch.where(mask.unsqueeze(-1), hidden + spread, hidden)
    injection.fired.append(layer)
    if args:
        return (hidden, *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": hidden}
