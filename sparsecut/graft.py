"""Where the method meets somebody else's modules: reading taps of an encoder, adding features before decoder layers.

Both use permanent hooks that look into a compile-aware context variable and do nothing while it is empty. A hook is not
a wrapper: names of weights, checkpoints, `generate` and the layers' own code stay as they are. Everything that leans on
the inner structure of transformers stands in this file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from transformers.utils.output_capturing import CompileableContextVar


@dataclass
class Reading:
    """One pass through an encoder: the wanted taps found so far."""

    taps: dict[int, Tensor] = field(default_factory=dict)
    as_tuple: bool = False  # what this encoder's blocks return, for the blocks that are skipped


@dataclass
class Injection:
    """One pass through a decoder: which positions are image tokens, what to add there, and what has been added."""

    mask: Tensor  # [batch, length], true at image tokens
    features: Mapping[int, Tensor]  # layer -> [number of true positions, H]
    fired: list[int] = field(default_factory=list)


_reading = CompileableContextVar("sparsecut_reading")
_injection = CompileableContextVar("sparsecut_injection")


def find_layers(module: nn.Module, depth: int, what: str) -> nn.ModuleList:
    """The module list that holds the `depth` layers of `module`: the outermost one of that length."""
    lists = [(name, m) for name, m in module.named_modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
    if not lists:
        raise ValueError(
            f"{what} {type(module).__name__} has no list of {depth} layers that features could be read from or added to; "
            "SparseCut needs a stack of transformer blocks as long as `num_hidden_layers`, so choose another model"
        )
    return min(lists, key=lambda item: item[0].count("."))[1]


def connect_encoder(encoder: nn.Module, taps: Iterable[int], depth: int) -> None:
    """Hook the tapped blocks; while taps are read, blocks above the deepest tap pass their input through unused."""
    layers, taps = find_layers(encoder, depth, "the vision encoder"), sorted(taps)
    for tap in taps:
        if tap == 0:
            layers[0].register_forward_pre_hook(_read_embeddings, with_kwargs=True)
        else:
            layers[tap - 1].register_forward_hook(partial(_read_block, tap))
    for layer in layers[max(taps) :]:
        layer.forward = partial(_skip_while_reading, layer.forward)


def connect_decoder(language_model: nn.Module, layers: Iterable[int], depth: int) -> None:
    """Hook the decoder layers that receive features."""
    stack = find_layers(language_model, depth, "the language model")
    for layer in layers:
        stack[layer].register_forward_pre_hook(partial(_add_features, layer), with_kwargs=True)


def read_taps(encoder: nn.Module, pixels: Tensor, num_patches: int, expected: Iterable[int]) -> dict[int, Tensor]:
    """Run the encoder on pixels [views, 3, S, S] and return tap -> [views, N, D], class and register tokens removed."""
    reading = Reading()
    token = _reading.set(reading)
    try:
        encoder(pixels)
    finally:
        _reading.reset(token)
    if missing := sorted(set(expected) - set(reading.taps)):
        raise RuntimeError(
            f"taps {missing} were not reached in {type(encoder).__name__}: its blocks are not the ones that were connected; "
            "connect the encoder again after replacing modules in it"
        )
    for tap, states in reading.taps.items():
        if states.dim() != 3 or states.shape[1] < num_patches:
            raise ValueError(
                f"tap {tap} of {type(encoder).__name__} gave states of shape {tuple(states.shape)}, but [views, at least "
                f"{num_patches} tokens, width] is needed; encoders with merged or packed patches are not supported"
            )
    return {tap: states[:, -num_patches:] for tap, states in reading.taps.items()}


def inject(run: Callable, mask: Tensor, features: Mapping[int, Tensor]):
    """Call `run()` while `features` (layer -> [tokens, H]) are added at the true positions of `mask` [batch, length].

    Every layer must receive its features exactly once, else RuntimeError: a silent miss is the one thing this must not do.
    """
    injection = Injection(mask, features)
    token = _injection.set(injection)
    try:
        output = run()
    finally:
        _injection.reset(token)
    if not torch.compiler.is_compiling() and sorted(injection.fired) != sorted(features):
        raise RuntimeError(
            f"shortcuts into layers {sorted(features)} should each fire once, but layers {sorted(injection.fired)} fired; "
            "a decoder layer was skipped, repeated or replaced: connect the language model again after replacing modules in it"
        )
    return output


def _read_embeddings(module, args, kwargs):
    if (reading := _reading.get()) is not None:
        reading.taps[0] = args[0] if args else kwargs["hidden_states"]


def _read_block(tap: int, module, args, output):
    if (reading := _reading.get()) is not None:
        reading.as_tuple = isinstance(output, tuple)
        reading.taps[tap] = output[0] if reading.as_tuple else output


def _skip_while_reading(forward: Callable, *args, **kwargs):
    reading = _reading.get()
    if reading is None:
        return forward(*args, **kwargs)
    hidden = args[0] if args else kwargs["hidden_states"]
    return (hidden,) if reading.as_tuple else hidden


def _add_features(layer: int, module, args, kwargs):
    injection = _injection.get()
    if injection is None or layer not in injection.features:
        return None
    hidden = args[0] if args else kwargs["hidden_states"]
    # Out of place, and on the layer's own device: in-place sums break autograd and recorded hidden states.
    mask = injection.mask.to(hidden.device).unsqueeze(-1)
    hidden = hidden + torch.zeros_like(hidden).masked_scatter(mask, injection.features[layer].to(hidden))
    injection.fired.append(layer)
    return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})
