"""The processor of an upgraded model that reads finer views: the base's own, which also cuts the
finer views of each picture.

The base's image processor makes the coarse view by some resizing, cropping and normalising. Asked for tiles times its size, it
makes the same picture finer, and the tiles of that lie exactly under the coarse view, whatever the steps are.
"""

from __future__ import annotations

import copy
import json
from functools import cache
from pathlib import Path

import transformers
from einops import rearrange
from torch import Tensor
from transformers import BatchFeature
from transformers.dynamic_module_utils import custom_object_save
from transformers.image_utils import make_flat_list_of_images

from .schema import UserError

PROCESSOR_FILE = "processor_config.json"


def fine_pixels(image_processor, images, tiles: int) -> Tensor:
    """The finer views of pictures, float [P, tiles^2, 3, S, S], row by row, cut as the image
    processor cuts the coarse one.
    """
    sizes = {}
    for name in ("size", "crop_size"):
        if (size := getattr(image_processor, name, None)) is not None:
            size = dict(size) if not isinstance(size, int) else {"height": size, "width": size}
            sizes[name] = {side: n * tiles for side, n in size.items() if n is not None}
    pictures = make_flat_list_of_images(images)
    pixels = image_processor(images=pictures, return_tensors="pt", **sizes)["pixel_values"]
    return rearrange(pixels, "p c (ty y) (tx x) -> p (ty tx) c y x", ty=tiles, tx=tiles)


class SparseCutUpgradeProcessor:
    """Loads a processor saved with an upgraded model: the base's own class, made to add
    `fine_pixel_values`.
    """

    # set where this file was loaded as remote code, which is then saved with every processor
    _auto_class = None

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoProcessor") -> None:
        """Note that an Auto class loaded this file as remote code; AutoProcessor calls it."""
        cls._auto_class = auto_class

    @classmethod
    def from_pretrained(cls, folder, **kwargs):
        """The processor of a folder or hub name; keywords are those of the base's own processor."""
        values, _ = transformers.ProcessorMixin.get_processor_dict(folder, **kwargs)
        base = getattr(transformers, values["base_processor_class"])
        return with_fine_views(base.from_pretrained(folder, **kwargs), values["sparsecut_tiles"])


def with_fine_views(processor, tiles: int):
    """A copy of a base's processor (its parts shared) that also returns the pictures' finer views;
    tiles per side.
    """
    processor = copy.copy(processor)
    base = getattr(type(processor), "base_processor_class", type(processor))
    processor.__class__ = _with_fine_views(base)
    processor.sparsecut_tiles = tiles
    return processor


@cache
def _with_fine_views(base: type) -> type:
    def call(self, images=None, text=None, **kwargs) -> BatchFeature:
        features = base.__call__(self, images=images, text=text, **kwargs)
        if images is not None and "pixel_values" in features:
            fine = fine_pixels(self.image_processor, images, self.sparsecut_tiles)
            if fine.shape[0] != len(features["pixel_values"]):
                raise UserError(
                    f"the processor made {len(features['pixel_values'])} views of {fine.shape[0]}"
                    " pictures, but finer views need one fixed-size view for each; turn off"
                    " cutting pictures into crops (do_pan_and_scan=False)"
                )
            features["fine_pixel_values"] = fine.to(features["pixel_values"])
        return features

    def save_pretrained(self, folder, **kwargs):
        saved = base.save_pretrained(self, folder, **kwargs)
        path = Path(folder) / PROCESSOR_FILE
        values = json.loads(path.read_text())
        values |= {
            "processor_class": "SparseCutUpgradeProcessor",
            "base_processor_class": base.__name__,
        }
        values["sparsecut_tiles"] = self.sparsecut_tiles
        if (auto_class := SparseCutUpgradeProcessor._auto_class) is not None:
            custom_object_save(self, folder)
            values["auto_map"] = {auto_class: "processing_upgraded.SparseCutUpgradeProcessor"}
        path.write_text(json.dumps(values, indent=2) + "\n")
        return saved

    def model_input_names(self):
        return [*base.model_input_names.fget(self), "fine_pixel_values"]

    def reduce(self):  # the class is made here, so workers that are started afresh make it again
        plain = base.__new__(base)
        plain.__dict__.update(self.__dict__)
        return with_fine_views, (plain, self.sparsecut_tiles)

    names = {
        "__call__": call,
        "save_pretrained": save_pretrained,
        "base_processor_class": base,
        "__reduce__": reduce,
    }
    names["__doc__"] = (
        f"{base.__name__}, which also returns the pictures' finer views as fine_pixel_values."
    )
    if isinstance(getattr(base, "model_input_names", None), property):
        names["model_input_names"] = property(model_input_names)
    return type(base.__name__, (base,), names)
