"""Encoders of timm, which transformers wraps as `timm_wrapper`.

Their configuration holds a name and arguments, no sizes. So the encoder is made once without
weights, and run on a view without values. Its blocks show the grid and the width of every tap. Then
a timm encoder is an encoder in stages, and a plain ViT is one whose stages are all alike.

To add an encoder: add its class in timm to `TIMM_BLOCKS`. Its blocks must return cells row by row.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from functools import lru_cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from .schema import UserError, nearest
from .stages import Stages
from .view_sizes import as_pair

TIMM = "timm_wrapper"
# Class in timm -> a pattern of the names of its lists of blocks, and how states lie (`Stages`).
TIMM_BLOCKS = {
    "VisionTransformer": (r"blocks", "tokens"),
    "VisionTransformerDistilled": (r"blocks", "tokens"),
    "VisionTransformerRelPos": (r"blocks", "tokens"),
    "Eva": (r"blocks", "tokens"),
    "Beit": (r"blocks", "tokens"),
    "Cait": (r"blocks", "tokens"),
    "Xcit": (r"blocks", "tokens"),
    "MlpMixer": (r"blocks", "tokens"),
    "NaFlexVit": (r"blocks", "tokens"),
    "VisionTransformerSAM": (r"blocks", "map"),
    "HieraDet": (r"blocks", "map"),
    "SwinTransformer": (r"layers\.\d+\.blocks", "map"),
    "SwinTransformerV2": (r"layers\.\d+\.blocks", "map"),
    "FocalNet": (r"layers\.\d+\.blocks", "channels"),
    "ConvNeXt": (r"stages\.\d+\.blocks", "channels"),
    "MetaNeXt": (r"stages\.\d+\.blocks", "channels"),
    "MetaFormer": (r"stages\.\d+\.blocks", "channels"),
    "MambaOut": (r"stages\.\d+\.blocks", "map"),
    "MaxxVit": (r"stages\.\d+\.blocks", "channels"),
    "DaVit": (r"stages\.\d+\.blocks", "channels"),
    "ResNetV2": (r"stages\.\d+\.blocks", "channels"),
    "PyramidVisionTransformerV2": (r"stages\.\d+\.blocks", "tokens"),
    "ResNet": (r"layer\d+", "channels"),
    "RegNet": (r"s\d+", "channels"),
    "EfficientNet": (r"blocks\.\d+", "channels"),
}
# Arguments of timm that let an encoder take views of any size, with the weights of its own size.
ANY_SIZE_ARGUMENTS = ({"dynamic_img_size": True}, {"strict_img_size": False})


def is_timm(config: Any) -> bool:
    """Whether an encoder is timm's."""
    return config.model_type == TIMM


def check_has_timm(values: dict, source: str) -> None:
    """Raise UserError where a configuration file is of a timm model, and timm cannot be imported.

    Args:
        values: What the file holds. Those on the hub that timm wrote have no `model_type`.
        source: Where it comes from, for the error.
    """
    is_of_timm = "architecture" in values and "pretrained_cfg" in values
    if values.get("model_type", TIMM if is_of_timm else None) == TIMM:
        import_timm(source)


def import_timm(source: str) -> Any:
    """The package timm; UserError where it, or torchvision, which it needs, cannot be imported."""
    try:
        return import_module("timm")
    except Exception as error:  # a torchvision made for another torch raises RuntimeError
        raise UserError(
            f"the encoder {source} is one of timm, and timm cannot be imported"
            f" ({type(error).__name__}: {error}); install it with a torchvision that fits your"
            " torch: pip install 'sparsecut[timm]'"
        ) from error


def read_timm(config: Any) -> Stages:
    """The stages of a timm encoder, as its blocks show them.

    Raises:
        UserError: timm is missing, has no such model, or its blocks are of an unknown form.
    """
    arguments = json.dumps(config.model_args or {}, sort_keys=True)
    input_size = (getattr(config, "pretrained_cfg", None) or {}).get("input_size")
    return _try_encoder(config.architecture, arguments, tuple(input_size or ()))


def allow_view_size(config: Any, view_size: Any) -> None:
    """Let a timm encoder that is about to be loaded take views of another size, if it can.

    Args:
        config: The encoder's configuration, whose `model_args` are changed.
        view_size: What the user gave; None for the encoder's own size.
    """
    if not is_timm(config) or view_size is None:
        return
    before = config.model_args or {}
    try:
        if read_timm(config).own_view == as_pair(view_size):
            return
    except UserError:
        pass  # at another size it may be whole
    for arguments in ({}, *ANY_SIZE_ARGUMENTS):
        config.model_args = {**before, **arguments}
        try:
            takes_any = read_timm(config).is_any_size
        except UserError:
            takes_any = False  # its class has no such argument
        if takes_any:
            return
    config.model_args = before or None


def make_timm_image_processor(config: Any, given: Any = None) -> Any:
    """An image processor with the mean and deviation that a timm encoder was trained with.

    timm's own cannot be saved, and needs torchvision.

    Args:
        config: The encoder's configuration.
        given: The image processor that the user gave, if any; others than timm's are kept.
    """
    from transformers import ViTImageProcessorPil

    if given is not None and type(given).__name__ != "TimmWrapperImageProcessor":
        return given
    values = getattr(given, "data_config", None) or getattr(config, "pretrained_cfg", None)
    if not values:
        timm = import_timm(config.architecture)
        values = timm.get_pretrained_cfg(config.architecture).to_dict()
    height, width = values["input_size"][-2:]
    return ViTImageProcessorPil(
        image_mean=list(values["mean"]),
        image_std=list(values["std"]),
        size={"height": height, "width": width},
    )


@lru_cache(maxsize=64)
def _try_encoder(architecture: str, arguments: str, input_size: tuple[int, ...]) -> Stages:
    """Make a timm encoder without weights and run it without values.

    Args:
        architecture: Its name in timm.
        arguments: `model_args` as JSON.
        input_size: Channels, height and width of its views where the configuration names them.
    """
    model = _make_without_weights(architecture, json.loads(arguments))
    kind = type(model).__name__
    if kind not in TIMM_BLOCKS:
        raise UserError(
            f"timm's {architecture} is a {kind}, and SparseCut does not know what its blocks"
            " return; use one of vit_*, deit3_*, eva02_*, beit*, swin_*, convnext_* or resnet*, or"
            f" another of {', '.join(TIMM_BLOCKS)}"
        )
    pattern, layout = TIMM_BLOCKS[kind]
    lists = [name for name, _ in model.named_modules() if re.fullmatch(pattern, name)]
    depths = [len(list(model.get_submodule(name).children())) for name in lists]
    view = _find_own_view(model, json.loads(arguments), input_size)
    unit = max(info["reduction"] for info in model.feature_info)
    rounded = tuple(max(1, side // unit) * unit for side in view)
    cells = _run_blocks(model, lists, layout, rounded)
    if cells is None or len(cells) != 1 + sum(depths):
        has_rest = rounded != view
        remedy = f"give view_size={rounded[0]} and its name or folder, not a loaded module"
        raise UserError(
            f"the blocks of timm's {architecture} do not return whole cells, all in one layout, for"
            f" views of {view[0]} x {view[1]} pixels; {f'{remedy}, or ' if has_rest else ''}use"
            " another encoder"
        )
    larger = (rounded[0] + unit, rounded[1] + 2 * unit)
    runs = [(kind, len(list(group))) for kind, group in itertools.groupby(cells[1:])]
    return Stages(
        blocks=tuple(f"timm_model.{name}" for name in lists),
        depths=tuple(depth for _, depth in runs),
        widths=tuple(width for (width, _), _ in runs),
        strides=tuple(stride for (_, stride), _ in runs),
        layout=layout,
        stem=cells[0],
        is_any_size=_run_blocks(model, lists, layout, larger) == cells,
        own_view=view,
    )


def _make_without_weights(architecture: str, arguments: dict) -> nn.Module:
    timm = import_timm(architecture)
    if not timm.is_model(architecture):
        raise UserError(
            f"timm {timm.__version__} has no model {architecture!r}; correct the name"
            f"{nearest(architecture, timm.list_models())}, or update timm"
        )
    try:
        with torch.device("meta"):
            model = timm.create_model(architecture, pretrained=False, num_classes=0, **arguments)
    except Exception as error:
        raise UserError(
            f"timm cannot make {architecture} with model_args={arguments}"
            f" ({type(error).__name__}: {error}); correct model_args"
        ) from error
    return model.eval()


def _find_own_view(model: nn.Module, arguments: dict, input_size: tuple) -> tuple[int, int]:
    """Height and width of the views that an encoder is made for."""
    if "img_size" in arguments:
        size = arguments["img_size"]
        return (size, size) if isinstance(size, int) else tuple(size)
    return tuple((input_size or model.pretrained_cfg["input_size"])[-2:])


def _run_blocks(
    model: nn.Module, lists: list[str], layout: str, view: tuple[int, int]
) -> list[tuple[int, int]] | None:
    """Width and stride of what enters the first block, and of what each block returns.

    Returns:
        None where the encoder does not take this view, or cells are not whole.
    """
    states: list[Any] = []
    blocks = [block for name in lists for block in model.get_submodule(name).children()]
    handles = [
        block.register_forward_hook(lambda *call: states.append(call[2])) for block in blocks
    ]
    first = blocks[0].register_forward_pre_hook(lambda _, args: states.append(args[0]))
    try:
        with torch.no_grad():
            model.forward_features(torch.zeros(1, 3, *view, device="meta"))
    except Exception:
        return None
    finally:
        for handle in (*handles, first):
            handle.remove()
    num_prefixes = getattr(model, "num_prefix_tokens", 0)
    cells = [_read_cells(state, layout, view, num_prefixes) for state in states]
    return None if None in cells else cells


def _read_cells(
    state: Any, layout: str, view: tuple[int, int], num_prefixes: int
) -> tuple[int, int] | None:
    """Width and stride of a block's states."""
    if not isinstance(state, Tensor) or state.dim() != (3 if layout == "tokens" else 4):
        return None
    width = state.shape[1 if layout == "channels" else -1]
    num_states = state[0].numel() // width
    # Some keep their class token out of the blocks.
    for num_cells in (num_states - num_prefixes, num_states):
        stride = math.isqrt(view[0] * view[1] // max(1, num_cells))
        if stride and num_cells * stride**2 == view[0] * view[1]:
            return width, stride
    return None
