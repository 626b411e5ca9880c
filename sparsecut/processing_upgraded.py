"""Processors of upgraded models: the base's processor, which gets every image as upright RGB.

With `tiles` it also cuts fine views. The base's image processor makes the coarse view by resizing,
cropping and normalizing. With `tiles` times its size it makes the same view at a finer scale. The
tiles of that lie exactly under the coarse view, whatever the steps are.
"""

from __future__ import annotations

import copy
import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from einops import rearrange
from PIL import Image
from torch import Tensor
from transformers import BatchFeature
from transformers.image_utils import make_flat_list_of_images

from .hub import check_hub_answers
from .pixels import (
    WHITE,
    array_to_rgb,
    list_images,
    open_image,
    parse_color,
    put_channels_last,
    to_array,
)
from .saved_code import drop_automatic_card, mark_as_missing, write_code
from .schema import UserError

PROCESSOR_FILE = "processor_config.json"


def cut_fine_views(image_processor: Any, images: Any, tiles: int) -> Tensor:
    """Cut the fine views of images by the steps that make their coarse views.

    Args:
        image_processor: The base's image processor.
        images: Images, also in nested lists.
        tiles: Fine views in each row and column.

    Returns:
        Float [images, tiles^2, 3, S, S], row by row.
    """
    sizes = {}
    for name in ("size", "crop_size"):
        size = getattr(image_processor, name, None)
        if size is not None:
            sizes[name] = _scale_size(size, tiles)
    images = make_flat_list_of_images(images)
    pixels = image_processor(images=images, return_tensors="pt", **sizes)["pixel_values"]
    return rearrange(pixels, "p c (ty y) (tx x) -> p (ty tx) c y x", ty=tiles, tx=tiles)


def _scale_size(size: Any, factor: int) -> dict[str, int]:
    if isinstance(size, int):
        size = {"height": size, "width": size}
    return {side: length * factor for side, length in dict(size).items() if length is not None}


def open_images(images: Any, background: Any, *, keeps_floats: bool, layout: Any = None) -> list:
    """Return images, in one list or one for each text, as RGB images that every base takes alike.

    Args:
        images: See `list_images`.
        background: What transparent parts are laid on.
        keeps_floats: Arrays of floats are passed on as they are, with channels first.
        layout: "channels_first" or "channels_last", for arrays.
    """

    def read(image: Any) -> Any:
        if isinstance(image, list):
            return [read(item) for item in image]
        if isinstance(image, Image.Image | str | Path | bytes):
            return open_image(image, background)
        if keeps_floats and to_array(image).dtype.kind == "f":
            return np.moveaxis(put_channels_last(image, layout), -1, 0).astype(np.float32)
        return array_to_rgb(image, layout, background)[0]

    return [read(item) for item in list_images(images)]


class SparseCutUpgradeProcessor:
    """Loads the processor of an upgraded model, a subclass of the base's class.

    It reads images as `pixels` does, and returns fine views where the plan has some. They stand in
    `fine_pixel_values`. Trainers that know no such input, such as TRL's GRPOTrainer, need
    `processor.join_views = True`: `pixel_values` then holds all views of each image.
    """

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoProcessor") -> None:
        """AutoProcessor calls this on remote code. Nothing is to do: code is saved by default."""

    @classmethod
    def from_pretrained(cls, folder: Any, **kwargs: Any) -> Any:
        """Load the processor of a folder or hub name; kwargs are those of the base's processor."""
        values, _ = transformers.ProcessorMixin.get_processor_dict(folder, **kwargs)
        base_class = getattr(transformers, values["base_processor_class"])
        processor = base_class.from_pretrained(folder, **kwargs)
        background = values.get("sparsecut_background", WHITE)
        processor = wrap_processor(processor, values["sparsecut_tiles"], background)
        processor.join_views = values.get("sparsecut_join_views", False)
        return processor


def wrap_processor(processor: Any, tiles: int = 0, background: Any = None) -> Any:
    """Return a copy of a base's processor that reads images as `pixels` does; it shares its parts.

    Args:
        processor: The base's processor, or one that was wrapped before.
        tiles: Fine views per side, which it returns too; 0 for none.
        background: What transparent parts are laid on; by default white, or as before.
    """
    background = background or getattr(processor, "background", WHITE)
    parse_color(background)
    processor = copy.copy(processor)
    base_class = getattr(type(processor), "base_processor_class", type(processor))
    processor.__class__ = _make_class(base_class, tiles > 0)
    processor.sparsecut_tiles = tiles
    processor.background = background
    return processor


@cache
def _make_class(base_class: type, has_fine_views: bool) -> type:
    """A subclass of a processor class, of the same name, that reads images and cuts fine views."""

    def call(self: Any, images: Any = None, text: Any = None, **kwargs: Any) -> BatchFeature:
        opened = None
        if images is not None:
            opened, kwargs = _open_for_call(images, self.background, kwargs)
        features = base_class.__call__(self, images=opened, text=text, **kwargs)
        if has_fine_views and opened is not None and "pixel_values" in features:
            _add_fine_views(self, features, opened)
        return features

    def save_pretrained(self: Any, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        saved = base_class.save_pretrained(self, str(save_directory), *args, **kwargs)
        _write_class(self, Path(save_directory) / PROCESSOR_FILE, base_class)
        return saved

    def push(self: Any, repo_id: str, *args: Any, **kwargs: Any) -> Any:
        check_hub_answers(repo_id, kwargs.get("token"))
        return base_class.push_to_hub(self, repo_id, *args, **kwargs)

    def upload(self: Any, working_dir: Any, *args: Any, **kwargs: Any) -> Any:
        # A save that pushes sends files before it returns.
        _write_class(self, Path(working_dir) / PROCESSOR_FILE, base_class)
        drop_automatic_card(working_dir)
        return base_class._upload_modified_files(self, working_dir, *args, **kwargs)

    def model_input_names(self: Any) -> Any:
        if self.join_views:
            return base_class.model_input_names.fget(self)
        return [*base_class.model_input_names.fget(self), "fine_pixel_values"]

    def reduce(self: Any) -> Any:
        # Pickle cannot find this class by name, so a new process makes it again.
        plain = base_class.__new__(base_class)
        plain.__dict__.update(self.__dict__)
        return wrap_processor, (plain, self.sparsecut_tiles)

    members = {
        "__doc__": f"{base_class.__name__} that reads images of every kind, fine views included.",
        "__call__": call,
        "__reduce__": reduce,
        "join_views": False,
        "save_pretrained": save_pretrained,
        "push_to_hub": push,
        "_upload_modified_files": upload,
        "base_processor_class": base_class,
    }
    if has_fine_views and isinstance(getattr(base_class, "model_input_names", None), property):
        members["model_input_names"] = property(model_input_names)
    return type(base_class.__name__, (base_class,), members)


def _add_fine_views(processor: Any, features: BatchFeature, images: list) -> None:
    """Cut fine views of images, and put them beside the coarse ones or behind each of these."""
    coarse = features["pixel_values"]
    fine = cut_fine_views(processor.image_processor, images, processor.sparsecut_tiles)
    _check_views(len(coarse), len(fine))
    fine = _convert_like(fine, coarse)
    if processor.join_views:
        features["pixel_values"] = _join_views(coarse, fine)
    else:
        features["fine_pixel_values"] = fine


def _open_for_call(images: Any, background: Any, kwargs: dict) -> tuple[list | None, dict]:
    """The images of a call, opened, and its other arguments; None where there is no image."""
    kwargs = dict(kwargs)
    for_images = kwargs.get("images_kwargs") or {}
    do_rescale = kwargs.get("do_rescale", for_images.get("do_rescale", True))
    layout = kwargs.pop("input_data_format", for_images.get("input_data_format"))
    if "input_data_format" in for_images:  # opened images have a layout of their own
        rest = {name: value for name, value in for_images.items() if name != "input_data_format"}
        kwargs["images_kwargs"] = rest
    opened = open_images(images, background, keeps_floats=do_rescale is False, layout=layout)
    has_image = any(not isinstance(image, list) or image for image in opened)
    return opened if has_image else None, kwargs


def _convert_like(fine: Tensor, coarse: Any) -> Any:
    """Fine views in the form of the coarse ones: a tensor, an array, or a list of arrays."""
    if isinstance(coarse, Tensor):
        return fine.to(coarse)
    array = fine.numpy()
    return array if isinstance(coarse, np.ndarray) else list(array)


def _join_views(coarse: Any, fine: Any) -> Any:
    """All views of each image [1 + tiles^2, 3, S, S], coarse one first, in the form of `coarse`."""
    if isinstance(coarse, Tensor):
        return torch.cat([coarse[:, None], fine], dim=1)
    joined = [np.concatenate([one[None], more]) for one, more in zip(coarse, fine, strict=True)]
    return np.stack(joined) if isinstance(coarse, np.ndarray) else joined


def _check_views(num_views: int, num_images: int) -> None:
    if num_images != num_views:
        raise UserError(
            f"the processor made {num_views} views of {num_images} images, but fine views need one"
            " fixed-size view per image; turn off crops of images (do_pan_and_scan=False)"
        )


def _write_class(processor: Any, path: Path, base_class: type) -> None:
    """Write into a saved processor's file how to load it again."""
    if getattr(transformers, base_class.__name__, None) is not base_class:
        # It could not be found again, so it is saved as it is. It must not be taken for its parts.
        mark_as_missing(path, base_class)
        return
    values = json.loads(path.read_text())
    values["sparsecut_background"] = processor.background
    values["processor_class"] = "SparseCutUpgradeProcessor"
    values["base_processor_class"] = base_class.__name__
    values["sparsecut_tiles"] = processor.sparsecut_tiles
    values["sparsecut_join_views"] = processor.join_views
    path.write_text(json.dumps(values, indent=2) + "\n")
    place = f"processing_upgraded.{SparseCutUpgradeProcessor.__name__}"
    write_code(path, [SparseCutUpgradeProcessor], {"AutoProcessor": place})
