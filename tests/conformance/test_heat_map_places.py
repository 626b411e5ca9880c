"""Heat maps of every family that can be upgraded: a token's boxes hold the spot that changes it."""

import inspect

import numpy as np
import pytest
import torch
from helpers import bases
from helpers.bases import randomize_fusion
from helpers.image_processors import IMAGE_PROCESSORS
from helpers.tiny import tiny_tokenizer
from PIL import Image

from sparsecut import upgrade
from sparsecut.evaluation.heat_maps import scaled
from sparsecut.evaluation.patch_places import locate_patches, watch_table

SIZES = [(90, 50), (41, 64)]  # width and height
SPOTS = [(0.35, 0.6), (0.72, 0.3)]
SIDE = 0.08
PLAN = {
    "norm": False,
    "shortcuts": [
        {"taps": [], "layer": 0, "mix": "base"},
        {"taps": [0], "layer": 1, "mix": "channels"},
    ],
}


class ImagesAlone:
    """A processor of which only the part for images is there."""

    image_token = "<image>"

    def __init__(self, name):
        self.image_processor = IMAGE_PROCESSORS[name]()
        self.tokenizer = tiny_tokenizer()

    def __call__(self, text, images, **settings):
        return self.image_processor(images[0], return_tensors="pt")


def trace(model, processor, images) -> tuple[torch.Tensor, list]:
    """What shortcut 1 adds at each token, [tokens, H], and the tokens' boxes by image."""
    inputs = processor("", [images])
    inner = model.family.parts(model.base).inner
    accepted = inspect.signature(inner.get_image_features).parameters
    arguments = {key: value for key, value in inputs.items() if key in accepted}
    parts = {}
    with (
        torch.no_grad(),
        watch_table(model) as table,
        scaled(model.fusion, {}, parts),
        model.shortcuts_active(),
    ):
        inner.get_image_features(**arguments)
    return parts[1], locate_patches(model, processor, images, table, "")


@pytest.mark.parametrize("name", IMAGE_PROCESSORS)
def test_the_token_that_a_spot_changes_most_shows_the_spot(name):
    model, _ = upgrade(bases.build_base(name), PLAN)
    randomize_fusion(model)
    processor = ImagesAlone(name)
    for changed, (x, y) in enumerate(SPOTS):
        added = []
        for level in (0, 255):
            images = [Image.new("RGB", size) for size in SIZES]
            width, height = SIZES[changed]
            box = (x * width, y * height, (x + SIDE) * width, (y + SIDE) * height)
            box = tuple(round(edge) for edge in box)
            images[changed].paste((level,) * 3, box)
            features, boxes = trace(model, processor, images)
            added.append(features)
        lengths = [len(own) for own in boxes]
        assert sum(lengths) == len(added[0])
        changes = (added[1] - added[0]).norm(dim=-1).split(lengths)
        assert changes[1 - changed].max() < 1e-3 * changes[changed].max()
        left, top, right, bottom = np.moveaxis(boxes[changed][changes[changed].argmax()], -1, 0)
        middle = (box[0] + box[2]) / 2 / width, (box[1] + box[3]) / 2 / height
        inside = (left - 0.02 <= middle[0]) & (middle[0] <= right + 0.02)
        inside &= (top - 0.02 <= middle[1]) & (middle[1] <= bottom + 0.02)
        assert inside.any()
