"""How shortcuts work inside a pretrained VLM that keeps its own forward and generate.

Three methods of the model's inner module are wrapped. In `get_image_features` the encoder's taps
are captured, and their patches are gathered under the image tokens they belong to. In `forward` the
features are added in the decoder. `get_video_features` runs without shortcuts. All three do what
they did before, unless an `UpgradeCall` is active: `shortcuts_active` sets it for one call.

`generate` encodes images before the prefill, then repeats and cuts the result for beams and chunks.
So there the shortcuts' features follow the model's own along the channels,
[N, H] -> [N, (1 + layers) * H], and `forward` separates them again.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .families import VLMFamily, VLMParts
from .fusion import Fusion
from .hooks import (
    CompileableContextVar,
    capture_taps,
    connect_decoder,
    connect_encoder,
    disconnect,
    inject,
    read_taps,
)
from .mixers import arrange_grains
from .schema import UserError


@dataclass
class UpgradeCall:
    """One call into an upgraded model.

    Attributes:
        family: Family of the base.
        parts: Parts of the base.
        fusion: The model's fusion.
        fine_pixels: Fine views of the call's images, [images, tiles^2, 3, S, S].
        features: Inside `forward`, features of image tokens by layer, [tokens, H]; else None.
        is_fusion_used: Whether the fusion was used in this call.
        is_paused: Whether the model encodes a video, which shortcuts do not read.
    """

    family: VLMFamily
    parts: VLMParts
    fusion: Fusion
    fine_pixels: Tensor | None = None
    features: dict[int, Tensor] | None = None
    is_fusion_used: bool = False
    is_paused: bool = False

    @property
    def layers(self) -> tuple[int, ...]:
        """Decoder layers that receive features, ascending; 0 is the input."""
        return self.fusion.plan.fused_layers

    @property
    def hidden_size(self) -> int:
        """Width H of the language model."""
        return self.parts.language.config.get_text_config().hidden_size


# Holds {"call": UpgradeCall}: transformers' own variables of this class hold dicts too.
_active_call = CompileableContextVar("sparsecut_upgrade_call")


def get_encoder_depth(vision: nn.Module) -> int:
    """Number of blocks of an encoder, from its configuration."""
    config = vision.config
    return config.num_hidden_layers if hasattr(config, "num_hidden_layers") else config.depth


def get_encoder_width(vision: nn.Module) -> int:
    """Width of an encoder's hidden states, from its configuration."""
    # Qwen2-VL's `hidden_size` is that of the language model.
    return getattr(vision.config, "embed_dim", None) or vision.config.hidden_size


def connect(parts: VLMParts) -> None:
    """Hook encoder and decoder, and wrap methods of the inner module.

    Connecting again only renews the hooks.
    """
    disconnect_all(parts)
    connect_encoder(parts.vision, get_encoder_depth(parts.vision))
    connect_decoder(parts.language, parts.language.config.get_text_config().num_hidden_layers)
    for name, wrapper in WRAPPERS.items():
        original = getattr(parts.inner, name, None)
        if original is not None:  # not every family has videos
            wrapped = partial(wrapper, parts.inner, original)
            # generate reads the signature to know which arguments it may pass
            wrapped.__signature__ = inspect.signature(original)
            setattr(parts.inner, name, wrapped)


def disconnect_all(parts: VLMParts) -> None:
    """Remove all hooks and wrappers, so that nothing of ours is left on the model."""
    disconnect(parts.vision)
    disconnect(parts.language)
    for name, wrapper in WRAPPERS.items():
        method = getattr(parts.inner, name, None)
        if getattr(method, "func", None) is wrapper:
            delattr(parts.inner, name)


@contextmanager
def shortcuts_active(call: UpgradeCall) -> Iterator[UpgradeCall]:
    """Inside the block the call's model has its shortcuts, in this thread."""
    token = _active_call.set({"call": call})
    try:
        yield call
    finally:
        _active_call.reset(token)


def _get_active_call(inner: nn.Module) -> UpgradeCall | None:
    """The active call of the model with this inner module; None where it runs without shortcuts."""
    active = _active_call.get()
    if active is None:
        return None
    call = active["call"]
    return call if call.parts.inner is inner and not call.is_paused else None


def _bind_arguments(function: Callable, args: tuple, kwargs: dict) -> dict:
    """All arguments of a call by name."""
    arguments = inspect.signature(function).bind(*args, **kwargs).arguments
    return {**arguments.pop("kwargs", {}), **arguments}


# --- encoder side: from images to features ---


def _get_image_features(inner: nn.Module, original: Callable, *args: Any, **kwargs: Any) -> Any:
    """Wraps `get_image_features`: computes the shortcuts' features in the same encoder pass.

    Inside `forward` they go to the decoder. Outside they follow the model's own features in
    `pooler_output`.
    """
    call = _get_active_call(inner)
    if call is None:
        return original(*args, **kwargs)
    vision = call.parts.vision
    wanted = call.fusion.plan.resolved_taps(get_encoder_depth(vision))
    output, taps = capture_taps(lambda: original(*args, **kwargs), wanted)
    missing = set(wanted) - set(taps)
    if missing:
        raise RuntimeError(
            f"taps {sorted(missing)} were not reached in {type(vision).__name__}: it was called in"
            " an unexpected way, or its modules were replaced; upgrade the model again"
        )
    arguments = _bind_arguments(original, args, kwargs)
    features = _compute_features(call, taps, arguments, output.pooler_output)
    if call.features is None:
        output.pooler_output = _append_features(output.pooler_output, features)
    else:
        call.features |= features
    return output


def _get_video_features(inner: nn.Module, original: Callable, *args: Any, **kwargs: Any) -> Any:
    """Wraps `get_video_features`: runs it without shortcuts.

    Some models encode videos through `get_image_features`, which must not take them for images.
    """
    call = _get_active_call(inner)
    if call is None:
        return original(*args, **kwargs)
    call.is_paused = True
    try:
        return original(*args, **kwargs)
    finally:
        call.is_paused = False


def _compute_features(
    call: UpgradeCall, taps: dict[int, Tensor], arguments: dict, pooled: Any
) -> dict[int, Tensor]:
    """Features by layer, [tokens, H], for the tokens of the model's own features `pooled`.

    They are zero where a token shows no patch.
    """
    shape = next(iter(taps.values())).shape
    index = call.family.patch_index(call.parts.inner, shape, arguments)
    num_tokens = _count_tokens(pooled)
    if len(index) != num_tokens:
        raise RuntimeError(
            f"{type(call.parts.inner).__name__} made {num_tokens} image tokens, but its geometry"
            f" gives {len(index)}, so the patches under each token are not known; this is a bug"
            " in SparseCut: please report the model and the image sizes"
        )
    index = index.to(call.fusion.gates.device)
    grains = _gather_grains(call, taps, arguments, index)
    call.is_fusion_used = True
    shows_no_patch = (index[:, 0] < 0).unsqueeze(-1)
    features = {}
    for layer, output in zip(call.layers, call.fusion(grains=grains), strict=True):
        features[layer] = output[:, 0].masked_fill(shows_no_patch, 0.0)
    return features


def _count_tokens(pooled: Any) -> int:
    """Image tokens of the model's own features: a list of [tokens, H], or a tensor."""
    return sum(image.shape[0] if image.dim() > 1 else 1 for image in pooled)


def _gather_grains(
    call: UpgradeCall, taps: dict[int, Tensor], arguments: dict, index: Tensor
) -> dict[int, Tensor]:
    """Grains under each token by tap, [tokens, G, 1, patches * D], for index [tokens, patches]."""
    fusion = call.fusion
    fine_taps = fusion.plan.fine_taps(get_encoder_depth(call.parts.vision))
    fine_states = {}
    if fine_taps and fusion.plan.tiles:
        fine_states = _read_fine_states(call, arguments["pixel_values"], fine_taps)
    grains = {}
    for tap, states in taps.items():
        states = fusion.normalize(states.to(index.device))
        if tap in fine_states:
            fine = fusion.normalize(fine_states[tap].to(index.device))
            grains[tap] = _gather_all_grains(states, fine, index, fusion)
        else:
            patches = states.flatten(0, -2)[index.clamp(min=0)]
            grains[tap] = patches.flatten(1)[:, None, None]
    return grains


def _gather_all_grains(coarse: Tensor, fine: Tensor, index: Tensor, fusion: Fusion) -> Tensor:
    """Coarse and fine grains under each token.

    Args:
        coarse: [images, L, D], prefix tokens included.
        fine: [images, tiles^2, N, D], without prefix tokens.
        index: [tokens, patches], numbers of patches in the flattened coarse states.
        fusion: gives tiles and rows.

    Returns:
        [tokens, G, 1, patches * D].
    """
    length = coarse.shape[1]
    num_prefix = length - fine.shape[2]
    views = torch.cat([coarse[:, None, num_prefix:], fine], dim=1)
    grains = arrange_grains(views, fusion.plan.tiles, fusion.rows)  # [images, G, N, D]
    number = index.clamp(min=0)
    image = number // length
    patch = number % length - num_prefix
    return grains[image, :, patch].transpose(1, 2).flatten(2).unsqueeze(2)


def _read_fine_states(
    call: UpgradeCall, pixels: Tensor, taps: tuple[int, ...]
) -> dict[int, Tensor]:
    """Encoder states of the fine views by tap, [images, tiles^2, N, D].

    The encoder runs up to the deepest tap only.
    """
    fine = call.fine_pixels
    num_views = call.fusion.plan.tiles**2
    expected = (len(pixels), num_views)
    if fine is None or fine.shape[:2] != expected:
        problem = "is missing" if fine is None else f"has the shape {tuple(fine.shape)}"
        raise UserError(
            f"fine_pixel_values {problem}, but the shortcuts read {num_views} fine views of each of"
            f" the {len(pixels)} images; prepare images with the processor of the upgraded model,"
            " and pass on all that it returns"
        )
    states = read_taps(call.parts.vision, fine.flatten(0, 1).to(pixels), call.fusion.rows**2, taps)
    return {tap: x.unflatten(0, (-1, num_views)) for tap, x in states.items()}


def _append_features(pooled: Any, features: dict[int, Tensor]) -> Any:
    """Put the shortcuts' features, in the order of layers, behind the model's own channels."""
    extra = torch.cat([features[layer] for layer in sorted(features)], dim=-1)
    if isinstance(pooled, Tensor):
        extra = extra.to(pooled).view(*pooled.shape[:-1], -1)
        return torch.cat([pooled, extra], dim=-1)
    num_tokens = [len(image) for image in pooled]
    extras = extra.split(num_tokens)
    joined = []
    for image, extra in zip(pooled, extras, strict=True):
        joined.append(torch.cat([image, extra.to(image)], dim=-1))
    return joined


def _split_features(pooled: Any, width: int) -> Any:
    """Undo `_append_features`: the model's own features, and the others [tokens, layers * H]."""
    if isinstance(pooled, Tensor):
        return pooled[..., :width], pooled[..., width:].flatten(0, -2)
    extra = torch.cat([image[:, width:] for image in pooled])
    return [image[:, :width] for image in pooled], extra


# --- decoder side: from features to hidden states ---


def _forward(inner: nn.Module, original: Callable, *args: Any, **kwargs: Any) -> Any:
    """Wraps `forward`: adds the features of its images before the decoder layers of the plan."""
    call = _get_active_call(inner)
    if call is None:
        return original(*args, **kwargs)
    arguments = _bind_arguments(original, args, kwargs)
    features = _take_features(call, arguments)
    call.features = features
    try:
        mask = _find_image_tokens(inner, arguments.get("input_ids"), arguments.get("inputs_embeds"))
        output = inject(lambda: original(**arguments), mask, features, later=True)
    finally:
        call.features = None
    if arguments.get("pixel_values") is not None and not features:
        raise RuntimeError(
            f"{type(inner).__name__} encoded its images without get_image_features, so no shortcut"
            " was used; upgrade the model again after replacing its modules"
        )
    return output


def _take_features(call: UpgradeCall, arguments: dict) -> dict[int, Tensor]:
    """Take the shortcuts' features out of encoder outputs that the call got, by layer.

    `arguments` then hold what the model itself expects. Without such outputs, the features come
    from `get_image_features` later.
    """
    encoder_outputs = arguments.get("mm_encoder_outputs") or {}
    images = encoder_outputs.get("image")
    if images is None:
        return {}
    width = call.hidden_size
    pooled, extra = _split_features(images.pooler_output, width)
    if extra.shape[-1] != len(call.layers) * width:
        raise UserError(
            f"the image features have {extra.shape[-1]} channels beside the model's own {width},"
            f" but {len(call.layers)} layers need {width} each; make them with get_image_features"
            " of the upgraded model, or give pixel_values"
        )
    images = copy.copy(images)
    images.pooler_output = pooled
    arguments["mm_encoder_outputs"] = {**encoder_outputs, "image": images}
    return dict(zip(call.layers, extra.split(width, dim=-1), strict=True))


def _find_image_tokens(inner: nn.Module, input_ids: Tensor | None, embeds: Tensor | None) -> Tensor:
    """Mask [B, L] of image tokens: by id, or by embedding where only embeddings are given."""
    token = inner.config.image_token_id
    if input_ids is not None:
        return input_ids == token
    placeholder = inner.get_input_embeddings()(torch.tensor(token, device=embeds.device))
    return (embeds == placeholder).all(-1)


WRAPPERS = {
    "get_image_features": _get_image_features,
    "get_video_features": _get_video_features,
    "forward": _forward,
}


# --- positions ---


class PositionCounter:
    """Counts the positions of records as a base with several axes of them does, without weights.

    Args:
        inner: The base's part with `get_rope_index`, which reads its configuration alone.
    """

    def __init__(self, inner: nn.Module):
        self.shell = type(inner).__new__(type(inner))
        nn.Module.__init__(self.shell)
        self.shell.config = inner.config
        plain = {name: x for name, x in vars(inner).items() if isinstance(x, int | float | str)}
        self.shell.__dict__.update(plain)

    def __call__(self, batch: dict[str, Tensor]) -> Tensor:
        """Return positions [axes, B, L] of a padded batch, as the base's processor makes it."""
        ids = batch["input_ids"]
        if batch.get("image_grid_thw") is None:
            return torch.arange(ids.shape[1]).expand(3, *ids.shape)
        count = self.shell.get_rope_index
        is_image = (ids == self.shell.config.image_token_id).int()
        given = {"mm_token_type_ids": is_image, **batch}
        known = inspect.signature(count).parameters
        return count(**{name: x for name, x in given.items() if name in known})[0]


def make_position_counter(inner: nn.Module) -> PositionCounter | None:
    """Return what counts positions where a base has several axes of them, else None."""
    return PositionCounter(inner) if "get_rope_index" in dir(type(inner)) else None
