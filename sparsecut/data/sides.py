"""Two sides of a source that share no image, and records without their images."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ..schema import UserError
from .turns import IMAGE

Example = Any  # of examples.py, which imports this module

DEV = "dev"
NUM_BYTES = 8  # of a digest that are read as a number


def take_side(examples: Sequence[Example], fraction: float, side: str, name: str) -> list[Example]:
    """Return the records of one side.

    The contents of an image decide its side. So the same image is on one side in every source, under
    any name and on any machine. A record without images is used for training. A record whose images
    are on both sides is left out.

    Args:
        examples: The records.
        fraction: About so much of the images is the dev part.
        side: "train" or "dev".
        name: Names the records in errors.

    Raises:
        UserError: No record is left.
    """
    known: dict[tuple, bool] = {}
    wants_dev = side == DEV
    taken = []
    for example in examples:
        sides = {_is_dev(example, image, fraction, known) for image in example.images} or {False}
        if sides == {wants_dev}:
            taken.append(example)
    if not taken:
        raise UserError(
            f"{name} gives no record to use: with dev={fraction:g}, none of {len(examples)} is on"
            f" the side {side!r}; its {len(known)} images are too few for this fraction, so give"
            " another one, or more images"
        )
    return taken


def _is_dev(example: Example, image: str | bytes, fraction: float, known: dict) -> bool:
    """Whether an image is in the dev part; `known` has what was found out before."""
    if isinstance(image, bytes):
        return _draw(image) < fraction
    key = str(example.store.path), image
    if key not in known:
        known[key] = _draw(example.store.read_bytes(image)) < fraction
    return known[key]


def _draw(content: bytes) -> float:
    """A number from 0 to below 1, always the same for the same content."""
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
