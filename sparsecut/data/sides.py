"""Two sides of a source that share no image, and records without their images."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ..schema import UserError
from .file_facts import read_stamp
from .turns import IMAGE

Example = Any  # of examples.py, which imports this module

DEV = "dev"
NUM_BYTES = 8  # of a digest that are read as a number
MOST_DRAWN = 1_000_000
DRAWN: dict[tuple, float] = {}  # an image's place and stamp -> its number


def take_side(examples: Sequence[Example], fraction: float, side: str, name: str) -> list[Example]:
    """Return the records of one side.

    The contents of an image decide its side. So the same image is on one side in every source,
    under any name and on any machine. A record without images is used for training. A record whose
    images are on both sides is left out.

    Args:
        examples: The records.
        fraction: About so much of the images is the dev part.
        side: "train" or "dev".
        name: Names the records in errors.

    Raises:
        UserError: No record is left.
    """
    wants_dev = side == DEV
    taken = []
    for example in examples:
        sides = {_draw(example, image) < fraction for image in example.images} or {False}
        if sides == {wants_dev}:
            taken.append(example)
    if not taken:
        number = len({image for example in examples for image in example.images})
        raise UserError(
            f"{name} gives no record to use: with dev={fraction:g}, none of {len(examples)} is on"
            f" the side {side!r}; its {number} images are too few for this fraction, so give"
            " another one, or more images"
        )
    return taken


def _draw(example: Example, image: str | bytes) -> float:
    """A number from 0 to below 1, always the same for the same image."""
    if isinstance(image, bytes):
        return _draw_content(image)
    stamp = read_stamp(example.store.find_file(image))
    key = (str(example.store.path), image, *stamp)
    if key not in DRAWN:
        if len(DRAWN) >= MOST_DRAWN:
            DRAWN.clear()
        DRAWN[key] = _draw_content(example.store.read_bytes(image))
    return DRAWN[key]


def _draw_content(content: bytes) -> float:
    digest = hashlib.sha256(b"dev part" + content).digest()
    return int.from_bytes(digest[:NUM_BYTES], "big") / 256**NUM_BYTES


def drop_images(example: Example) -> Example:
    """Return a record without its images and without their places in the text."""
    messages = []
    for message in example.messages:
        if message["role"] == "user":
            message = {**message, "content": _drop_places(message["content"])}
        messages.append(message)
    return replace(example, images=[], messages=messages, medium="image")


def _drop_places(text: str) -> str:
    """A text without the places of images, and without the line that each had for itself."""
    if IMAGE not in text:
        return text
    for place in (f"{IMAGE}\n", f"\n{IMAGE}", IMAGE):
        text = text.replace(place, "")
    return text.strip()
