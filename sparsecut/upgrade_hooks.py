"""How shortcuts ride through a finished vision-language model that keeps its own forward and
generate.

Methods of the model's inner module are wrapped where it stands: `get_image_features`, whose encoder pass is watched and
whose patches are gathered under the image tokens they belong to, and `forward`, around which the features are added to
the decoder. They do what they always did unless an `UpgradeCall` is at work, which `shortcuts_active` sets for one call.

`generate` encodes pictures before the prompt pass, and expands and cuts what comes out for beams and chunks. There the features
travel beside the model's own, [N, H] -> [N, (1 + layers) * H], and are taken off before the model sees them.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

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
    """One call into an upgraded model: whose shortcuts, and what is known of its pictures.

    fine: finer views of the call's pictures, [P, tiles^2, 3, S, S]. features: while a forward is
    under way, layer -> [tokens, H].
    used: whether the fusion has been used. paused: while the model encodes a video, which shortcuts
    do not read.
    """

    family: VLMFamily
    parts: VLMParts
    fusion: Fusion
    fine: Tensor | None = None
    features: dict[int, Tensor] | None = None
    used: bool = False
    paused: bool = False

    @property
    def layers(self) -> tuple[int, ...]:
        """Decoder layers that receive features, ascending, the input included."""
        return self.fusion.plan.fused_layers


_overlay = CompileableContextVar("sparsecut_overlay")


def depth_of(vision: nn.Module) -> int:
    """Number of blocks of an encoder, by its configuration."""
    config = vision.config
    return config.num_hidden_layers if hasattr(config, "num_hidden_layers") else config.depth


def width_of(vision: nn.Module) -> int:
    """Width of an encoder's states; Qwen2-VL's `hidden_size` is the language model's."""
    return getattr(vision.config, "embed_dim", None) or vision.config.hidden_size


def connect(parts: VLMParts) -> None:
    """Hook encoder and decoder, and wrap the inner module's two methods; connecting again only
    renews this.
    """
    language = parts.language.config.get_text_config()
    disconnect_all(parts)
    connect_encoder(parts.vision, depth_of(parts.vision))
    connect_decoder(parts.language, language.num_hidden_layers)
    for name, wrapper in WRAPPERS.items():
        if (own := getattr(parts.inner, name, None)) is None:
            continue  # not every family has videos
        wrapped = partial(wrapper, parts.inner, own)
        wrapped.__signature__ = inspect.signature(own)  # generate asks what it may hand over
        setattr(parts.inner, name, wrapped)


def disconnect_all(parts: VLMParts) -> None:
    """Take hooks and wraps off, so that nothing of ours is left on the model."""
    disconnect(parts.vision)
    disconnect(parts.language)
    for name in WRAPPERS:
        if getattr(getattr(parts.inner, name, None), "func", None) is WRAPPERS[name]:
            delattr(parts.inner, name)


@contextmanager
def shortcuts_active(overlay: UpgradeCall) -> Iterator[UpgradeCall]:
    """Inside the block the overlay's model has its shortcuts, in this thread."""
    token = _overlay.set(
        {"overlay": overlay}
    )  # a dict, as transformers' own variables of this class hold
    try:
        yield overlay
    finally:
        _overlay.reset(token)


def _ours(inner: nn.Module) -> UpgradeCall | None:
    held = _overlay.get()
    ours = held is not None and held["overlay"].parts.inner is inner and not held["overlay"].paused
    return held["overlay"] if ours else None


def _get_image_features(inner: nn.Module, own: Callable, *args, **kwargs):
    """The model's own features, shortcuts' features beside them or, inside a forward, put where the
    decoder finds them.
    """
    overlay = _ours(inner)
    if overlay is None:
        return own(*args, **kwargs)
    call = inspect.signature(own).bind(*args, **kwargs).arguments
    call = {**call.pop("kwargs", {}), **call}
    wanted = overlay.fusion.plan.resolved_taps(depth_of(overlay.parts.vision))
    output, taps = capture_taps(lambda: own(*args, **kwargs), wanted)
    if missing := set(wanted) - set(taps):
        raise RuntimeError(
            f"taps {sorted(missing)} were not reached in {type(overlay.parts.vision).__name__}: it"
            " was called in another way than expected, or modules in it were replaced; upgrade the"
            " model again"
        )
    features = _fuse(overlay, taps, call, output.pooler_output)
    if overlay.features is None:
        output.pooler_output = _beside(output.pooler_output, features)
    else:
        overlay.features |= features
    return output


def _get_video_features(inner: nn.Module, own: Callable, *args, **kwargs):
    """The model's own: some models encode videos through their get_image_features, which is not to
    be taken for a picture.
    """
    overlay = _ours(inner)
    if overlay is None:
        return own(*args, **kwargs)
    overlay.paused = True
    try:
        return own(*args, **kwargs)
    finally:
        overlay.paused = False


def _fuse(overlay: UpgradeCall, taps: dict[int, Tensor], call: dict, pooled) -> dict[int, Tensor]:
    """Layer -> [tokens, H] for the tokens of the pooled features, zeros where a token shows no
    patch.
    """
    fusion, vision = overlay.fusion, overlay.parts.vision
    shape = next(iter(taps.values())).shape
    index = overlay.family.patch_index(overlay.parts.inner, shape, call)
    wanted = sum(rows.shape[0] if rows.dim() > 1 else 1 for rows in pooled)
    if index.shape[0] != wanted:
        raise RuntimeError(
            f"{type(overlay.parts.inner).__name__} made {wanted} image tokens where"
            f" {index.shape[0]} were expected by its geometry; it is not known which patches lie"
            " under which token; this is a fault of SparseCut: please report the model and the"
            " pictures"
        )
    device = fusion.gates.device
    index = index.to(device)
    grains = {}
    fine_taps = fusion.plan.fine_taps(depth_of(vision))
    fine = _fine_states(overlay, call, fine_taps) if fine_taps and fusion.plan.tiles else {}
    for tap, states in taps.items():
        states = fusion.normed(states.to(device))
        if tap in fine:
            grains[tap] = _with_fine(states, fusion.normed(fine[tap].to(device)), index, fusion)
        else:
            grains[tap] = states.flatten(0, -2)[index.clamp(min=0)].flatten(1)[:, None, None]
    overlay.used = True
    blank = (index[:, 0] < 0).unsqueeze(-1)
    outputs = zip(fusion.plan.fused_layers, fusion(grains=grains), strict=True)
    return {layer: z[:, 0].masked_fill(blank, 0.0) for layer, z in outputs}


def _with_fine(states: Tensor, fine: Tensor, index: Tensor, fusion: Fusion) -> Tensor:
    """Coarse states [P, L, D], fine ones [P, tiles^2, N, D], index [K, U] into P * L -> grains [K,
    G, 1, U * D].
    """
    length, num_patches = states.shape[1], fine.shape[2]
    prefix = length - num_patches
    views = torch.cat([states[:, None, prefix:], fine], dim=1)
    under = arrange_grains(views, fusion.plan.tiles, fusion.rows)  # [P, G, N, D]
    number = index.clamp(min=0)
    picture, patch = number // length, number % length - prefix
    return under[picture, :, patch].transpose(1, 2).flatten(2).unsqueeze(2)


def _fine_states(overlay: UpgradeCall, call: dict, taps: tuple[int, ...]) -> dict[int, Tensor]:
    """The states of the call's finer views: tap -> [P, tiles^2, N, D]; the encoder runs no further
    than the deepest tap.
    """
    pixels, fine = call["pixel_values"], overlay.fine
    num = overlay.fusion.plan.tiles**2
    if fine is None or fine.shape[:2] != (len(pixels), num):
        given = (
            "none were given"
            if fine is None
            else f"fine_pixel_values of shape {tuple(fine.shape)} were given"
        )
        raise UserError(
            f"this model's shortcuts read {num} finer views of each of the {len(pixels)} pictures,"
            f" but {given}; prepare pictures with the processor that came with the upgraded model"
            " (its fine_pixel_values go to the model with the rest)"
        )
    vision = overlay.parts.vision
    states = read_taps(vision, fine.flatten(0, 1).to(pixels), overlay.fusion.rows**2, taps)
    return {tap: x.unflatten(0, (-1, num)) for tap, x in states.items()}


def _beside(pooled, features: dict[int, Tensor]):
    """The pooled features, list or tensor, with the layers' features to the right of them."""
    extra = torch.cat([features[layer] for layer in sorted(features)], dim=-1)
    if isinstance(pooled, Tensor):
        return torch.cat([pooled, extra.to(pooled).view(*pooled.shape[:-1], -1)], dim=-1)
    parts = extra.split([len(rows) for rows in pooled])
    return [
        torch.cat([rows, part.to(rows)], dim=-1) for rows, part in zip(pooled, parts, strict=True)
    ]


def _apart(pooled, width: int):
    """The model's own pooled features as they came, and what stood beside them, [tokens, layers *
    H].
    """
    if isinstance(pooled, Tensor):
        return pooled[..., :width], pooled[..., width:].flatten(0, -2)
    return [rows[:, :width] for rows in pooled], torch.cat([rows[:, width:] for rows in pooled])


def _forward(inner: nn.Module, own: Callable, *args, **kwargs):
    """The model's own forward, with the features of its pictures added before the decoder layers of
    the plan.
    """
    overlay = _ours(inner)
    if overlay is None:
        return own(*args, **kwargs)
    call = inspect.signature(own).bind(*args, **kwargs).arguments
    call = {**call.pop("kwargs", {}), **call}
    width, features = overlay.parts.language.config.get_text_config().hidden_size, {}
    images = (call.get("mm_encoder_outputs") or {}).get("image")
    if images is not None:
        pooled, beside = _apart(images.pooler_output, width)
        if beside.shape[-1] != len(overlay.layers) * width:
            raise UserError(
                f"the image features given have {beside.shape[-1]} channels beside the model's own"
                f" {width}, but {len(overlay.layers)} layers of {width} are needed; make them with"
                " the upgraded model's get_image_features, or give pixel_values"
            )
        features = dict(zip(overlay.layers, beside.split(width, dim=-1), strict=True))
        images = copy.copy(images)
        images.pooler_output = pooled
        call["mm_encoder_outputs"] = {**call["mm_encoder_outputs"], "image": images}
    overlay.features = features
    try:
        mask = _image_mask(inner, call.get("input_ids"), call.get("inputs_embeds"))
        output = inject(lambda: own(**call), mask, features, later=True)
    finally:
        overlay.features = None
    if call.get("pixel_values") is not None and not features:
        raise RuntimeError(
            f"{type(inner).__name__} was given pictures but did not encode them through"
            " get_image_features, so no shortcut fired; upgrade the model again after replacing"
            " its modules"
        )
    return output


def _image_mask(inner: nn.Module, input_ids: Tensor | None, embeds: Tensor | None) -> Tensor:
    """Where image tokens stand, [B, L]: by id, or by embedding where only embeddings are given, as
    the models do it.
    """
    token = inner.config.image_token_id
    if input_ids is not None:
        return input_ids == token
    return (embeds == inner.get_input_embeddings()(torch.tensor(token, device=embeds.device))).all(
        -1
    )


WRAPPERS = {
    "get_image_features": _get_image_features,
    "get_video_features": _get_video_features,
    "forward": _forward,
}
