"""Adds features before the decoder layers of a model inside vLLM.

vLLM flattens a batch to one row of tokens, and replays recorded graphs. So the features of a layer
lie in a buffer of its own, at the places of their tokens and zero elsewhere. Its address never
changes. A hook adds the buffer's first rows to the hidden states that enter the layer.

In a pipeline the first stage writes the features of all layers. Every stage adds those of its own
layers, and sends those of later layers on beside the hidden states.
"""

from __future__ import annotations

import inspect
from functools import partial

import torch
from torch import Tensor, nn

BUFFER = "shortcut_features"  # name of a layer's buffer; with its number, of what stages send


class ShortcutBuffers:
    """The buffers of a plan's decoder layers.

    Args:
        layers: All decoder layers, in order. On a stage of a pipeline those of other stages are
            placeholders.
        chosen: Numbers of the layers that receive features.
        num_tokens: The most tokens of one step.
        width: H, the width of the language model.
        dtype: Of hidden states.
        stage: Numbers of the layers that this stage of a pipeline has.
    """

    def __init__(
        self,
        layers: nn.ModuleList,
        chosen: tuple[int, ...],
        num_tokens: int,
        width: int,
        dtype: torch.dtype,
        stage: range,
    ):
        self.num_written = 0
        self.stage = stage
        self.buffers: dict[int, Tensor] = {}  # by layer, of this stage and of later ones
        for number in chosen:
            if number < stage.start:
                continue
            zeros = torch.zeros(num_tokens, width, dtype=dtype)
            self.buffers[number] = zeros
            if number in stage:
                layer = layers[number]
                layer.register_buffer(BUFFER, zeros, persistent=False)
                place = _find_hidden_states(layer)
                layer.register_forward_pre_hook(partial(_add_buffer, place), with_kwargs=True)

    def write(self, features: Tensor | None, mask: Tensor | None) -> None:
        """Write the features of a step; rows without features are zero.

        Args:
            features: [image tokens, layers * H], or None for a step without images.
            mask: Where they belong, [tokens].
        """
        self.clear(self.num_written)
        self.num_written = 0
        if features is None or not self.buffers:
            return
        rows = mask.nonzero().squeeze(-1).to(features.device)
        parts = features.chunk(len(self.buffers), dim=-1)
        for buffer, part in zip(self.buffers.values(), parts, strict=True):
            buffer.index_copy_(0, rows, part.to(buffer))
        self.num_written = len(mask)

    def clear(self, num_tokens: int) -> None:
        """Set the first rows to zero, so that no later step sees the features of this one."""
        for buffer in self.buffers.values():
            buffer[:num_tokens].zero_()

    def make_empty(self, num_tokens: int, dtype: torch.dtype, device: torch.device) -> dict:
        """Return zeros in the form of what the stage before this one sends, {name: [tokens, H]}."""
        if self.stage.start == 0:
            return {}
        shapes = {_name(n): (num_tokens, buffer.shape[-1]) for n, buffer in self.buffers.items()}
        return {n: torch.zeros(shape, dtype=dtype, device=device) for n, shape in shapes.items()}

    def receive(self, sent: dict[str, Tensor]) -> dict[str, Tensor]:
        """Write what the stage before this one sent; returns what is the decoder's own."""
        rest = dict(sent)
        for number, buffer in self.buffers.items():
            features = rest.pop(_name(number))
            buffer[: len(features)].copy_(features)
        return rest

    def copy_later(self, num_tokens: int) -> dict[str, Tensor]:
        """Copy the features of later stages' layers, {name: [tokens, H]}."""
        later = {n: x for n, x in self.buffers.items() if n >= self.stage.stop}
        return {_name(number): buffer[:num_tokens].clone() for number, buffer in later.items()}


def _name(number: int) -> str:
    """The name under which a layer's features go from stage to stage."""
    return f"{BUFFER}_{number}"


def _find_hidden_states(layer: nn.Module) -> int:
    """The position of `hidden_states` among the arguments of a layer's forward."""
    return list(inspect.signature(layer.forward).parameters).index("hidden_states")


def _add_buffer(place: int, layer: nn.Module, args: tuple, kwargs: dict):
    """Add a layer's buffer to the hidden states that enter it."""
    # vLLM's layers take (hidden, residual) and sum both first, so adding to one adds to the sum.
    # Layers of vLLM's Transformers backend take [1, tokens, H], its own take [tokens, H].
    hidden = args[place] if place < len(args) else kwargs["hidden_states"]
    hidden = hidden + getattr(layer, BUFFER)[: hidden.shape[-2]]
    if place < len(args):
        return (*args[:place], hidden, *args[place + 1 :]), kwargs
    return args, {**kwargs, "hidden_states": hidden}
