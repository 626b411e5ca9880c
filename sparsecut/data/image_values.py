"""Images as records give them: names, data URLs, bytes, objects of `datasets` or PIL, arrays."""

from __future__ import annotations

import base64
import binascii
import io
import re
import urllib.parse
from pathlib import PurePath
from typing import Any

import numpy as np
from PIL import Image

from ..pixels import array_to_rgb, to_rgb
from ..schema import UserError
from ..tensors import is_tensor
from .access import check_excess
from .errors import show_value
from .texts import check_text, list_items, list_rows

LONGEST_NAME = 4096  # characters of a path
MOST_OBJECTS = 3  # inside one another around one image, as in {"image_url": {"url": ...}}
SCHEME = re.compile(r"([a-z][a-z0-9+.-]+)://", re.IGNORECASE)
# How base64 of PNG, JPEG, GIF and WebP files begins. No path of so many characters begins so.
BASE64_STARTS = ("iVBORw0KGgo", "/9j/", "R0lGOD", "UklGR")
LEAST_BASE64 = 64  # characters
# Keys of an object that holds an image, in the order in which they are looked at.
IMAGE_KEYS = ("bytes", "path", "image", "image_url", "url", "base64", "data", "source")
BASE64_KEYS = ("base64", "data")

ImageValue = str | bytes  # the name of an image, or its encoded bytes


class CellName(str):
    """The name of an image that stands in a cell of a table, which stays on disk."""


def is_cell(value: Any) -> bool:
    """Whether a value of a record names images in cells of a table."""
    return isinstance(value, list) and bool(value) and isinstance(value[0], CellName)


def parse_images(value: Any, key: str, max_bytes: int) -> list[ImageValue]:
    """Return the images of a record's key, in order.

    Args:
        value: One image, a list of images, or None.
        key: The key, for errors.
        max_bytes: Bytes that one image may take.

    Raises:
        UserError: A value is no image, or too large.
    """
    if value is None:
        return []
    value = list_rows(list_items(value))
    images = value if isinstance(value, list | tuple) else [value]
    return [parse_image(image, f"`{key}`", max_bytes) for image in images]


def parse_image(image: Any, what: str, max_bytes: int) -> ImageValue:
    """Return the name of an image, or its encoded bytes.

    Args:
        image: A path, a file or data URL, base64, bytes, an object with one of these, a PIL image
            or an array.
        what: Where it stands, for errors.
        max_bytes: Bytes that it may take.

    Raises:
        UserError: It is no image, or too large.
    """
    image = _unpack(image, what)
    if isinstance(image, PurePath):
        image = str(image)
    if isinstance(image, Image.Image | np.ndarray) or is_tensor(image):
        image = _encode(image)
    if isinstance(image, bytearray | memoryview):
        image = bytes(image)
    if not isinstance(image, str | bytes) or not image:
        raise UserError(
            f"{what} holds {show_value(image)}, but an image's name or a list of names is needed"
        )
    if isinstance(image, str):
        check_text(image, what)
        image = _read_name(image, what)
    if isinstance(image, bytes):
        check_excess(f"an image in {what}", len(image), max_bytes)
    return image


def find_image_value(holder: dict) -> Any:
    """Return what an object holds under one of the keys for images, None where it holds nothing."""
    for key in IMAGE_KEYS:
        value = holder.get(key)
        if not _is_missing(value):
            return _mark_base64(value) if key in BASE64_KEYS else value
    return None


def _is_missing(value: Any) -> bool:
    """Whether nothing is there; a table fills the keys that other parts have with None."""
    if isinstance(value, dict):
        return all(map(_is_missing, value.values()))
    return value is None or (isinstance(value, str | bytes) and not value)


def _mark_base64(value: Any) -> Any:
    """A text under a key for base64 is decoded, whatever it begins with."""
    is_text = isinstance(value, str) and not value.lower().startswith("data:")
    return _decode_base64(value, "an image") if is_text else value


def _unpack(image: Any, what: str) -> Any:
    for _ in range(MOST_OBJECTS):
        if not isinstance(image, dict):
            return image
        value = find_image_value(image)
        if value is None:
            raise UserError(
                f"{what} holds an object with {', '.join(map(str, image)) or 'nothing'}, but"
                " an image has `bytes`, `path` or `url`"
            )
        image = value
    return image


def _read_name(name: str, what: str) -> ImageValue:
    """A name, or the bytes that a text holds itself."""
    if name[:5].lower() == "data:":
        return decode_data_url(name)
    if len(name) >= LEAST_BASE64 and name.startswith(BASE64_STARTS):
        return _decode_base64(name, what)
    if name[:7].lower() == "file://":
        name = urllib.parse.unquote(name[7:]).removeprefix("localhost")
    scheme = SCHEME.match(name)
    if scheme is not None:
        raise UserError(
            f"{what} names {show_value(name)}, and images of records are not fetched from"
            f" {scheme[1].lower()}; download it once, and name the file"
        )
    if len(name) > LONGEST_NAME:
        raise UserError(
            f"{what} holds a name of {len(name):,} characters, but no path is longer than"
            f" {LONGEST_NAME:,}; correct it"
        )
    return name


def decode_data_url(url: str) -> bytes:
    """Return the bytes of a base64 data URL; UserError where it is not one."""
    head, comma, body = url.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise UserError(
            f"the image {show_value(url)} is not a base64 data URL; give data:image/png;base64,..."
            " with the file's bytes"
        )
    return _decode_base64(urllib.parse.unquote(body), f"the image {show_value(url)}")


def _decode_base64(text: str, what: str) -> bytes:
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise UserError(
            f"{what} has broken base64 ({error}); encode the file's bytes again"
        ) from None


def _encode(image: Any) -> bytes:
    """An opened image as a file that holds its pixels in full."""
    is_opened = isinstance(image, Image.Image)
    rgb = to_rgb(image) if is_opened else array_to_rgb(image)[0]
    file = io.BytesIO()
    rgb.save(file, "PNG")
    return file.getvalue()
