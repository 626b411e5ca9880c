"""Any image to upright RGB pixels of 8 bits: files, bytes, URLs, PIL images, arrays and tensors.

Every image that this package reads goes through here, so it has the same pixels by every way.
Transparent parts lie on a background, deep images are scaled, orientation tags are applied.
"""

from __future__ import annotations

import base64
import io
from contextlib import contextmanager
from functools import cache
from http.client import HTTPException
from pathlib import Path
from typing import Any, BinaryIO
from urllib import parse, request

import numpy as np
from PIL import ExifTags, Image, ImageColor, UnidentifiedImageError

from .schema import UserError
from .tensors import is_tensor

# No other decoder of Pillow is run: some are fragile, and that of EPS starts Ghostscript.
FORMATS = ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "AVIF")
WHITE = "white"
ImageSource = Image.Image | str | Path | bytes
_Opened = tuple[Image.Image, bool]
# What is done to an image with each value of the orientation tag.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
DEEP_MODES = ("I", "I;16", "I;16L", "I;16B", "I;16N", "F")
# Samples of a PNG file that Pillow scales or cuts to 8 bits, but not the transparent value.
SAMPLE_SCALES = {"L;2": 85, "L;4": 17, "RGB;16B": 1 / 256}
MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}  # by the channels of an array
BITS_8, BITS_12, BITS_16, BITS_31, BITS_32 = 255, 4095, 65535, 2**31 - 1, 2**32 - 1
BITS_PER_SAMPLE, PHOTOMETRIC, MAX_SAMPLE_VALUE = 258, 262, 281  # tags of TIFF
TOLERANCE = 0.005  # how far rounding and resizing may lead beyond 0 and 1
LEAST_LEVEL = 16  # a brightest value below it is taken for a wrong scale
URL_STARTS = ("http://", "https://", "data:")
URL_SECONDS = 30


# --- from files ---


def open_image(source: ImageSource, background: Any = WHITE) -> Image.Image:
    """Return an image in RGB, upright and opaque.

    Args:
        source: A PIL image, the path of a file, a file's bytes, or an http(s) or data URL.
        background: What transparent parts are laid on: a colour as Pillow names it.

    Raises:
        UserError: There is no such file, or it is no image that can be read.
    """
    if isinstance(source, Image.Image):
        return to_rgb(source, background)
    if isinstance(source, bytes):
        return open_upright(io.BytesIO(source), "the image", background)
    if isinstance(source, str) and source[:8].lower().startswith(URL_STARTS):
        return open_upright(io.BytesIO(read_url(source)), f"the image {source[:60]}", background)
    try:
        path = Path(source).expanduser()
        is_file = path.is_file()
    except (OSError, ValueError, RuntimeError):  # longer than a path may be, or no path at all
        is_file = False
    if not is_file:
        raise UserError(f"there is no image {str(source)[:300]}; give the path of an image file")
    with _explained(f"the image {source}"), path.open("rb") as file:
        return open_upright(file, f"the image {source}", background)


def open_upright(file: BinaryIO, what: str = "the image", background: Any = WHITE) -> Image.Image:
    """Read an image file as upright RGB.

    Args:
        file: The open file. Of an animation, the first frame is read.
        what: What it is, for the message of an error.
        background: What transparent parts are laid on.

    Raises:
        UserError: It is of another format, broken, or too large.
    """
    with _explained(what), Image.open(file, formats=find_formats()) as image:
        rgb = to_rgb(image, background, what)
        if rgb is image:
            rgb = image.copy()
            rgb.info = {}
        return rgb


def read_size(file: BinaryIO, what: str, *, upright: bool = False) -> tuple[int, int]:
    """Return width and height, as stored or upright (Pillow turns TIFF itself); errors as above."""
    with _explained(what), Image.open(file, formats=find_formats()) as image:
        is_turned = upright and image.format != "TIFF" and _read_orientation(image) in range(5, 9)
        return image.size[::-1] if is_turned else image.size


@cache
def find_formats() -> tuple[str, ...]:
    """Return those of `FORMATS` that this Pillow reads."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


@contextmanager
def _explained(what: str) -> Any:
    """Turn whatever Pillow raises for a broken file, which may be anything, into one sentence."""
    try:
        yield
    except UserError:
        raise
    except UnidentifiedImageError:  # its message holds an address in memory
        raise UserError(
            f"{what} cannot be read: it is broken, or its format is none of"
            f" {', '.join(find_formats())}; convert it to one of them"
        ) from None
    except Exception as error:
        reason = str(error) or type(error).__name__
        raise UserError(
            f"{what} is broken, or too large to be read ({reason}); give an intact file of"
            f" {', '.join(find_formats())}"
        ) from error


def read_url(url: str, medium: str = "image") -> bytes:
    """Return the bytes of a data URL, or of what an http(s) URL names; UserError if it cannot."""
    if url[:5].lower() == "data:":
        head, _, body = url.partition(",")
        try:
            data = parse.unquote_to_bytes(body)
            is_base64 = head.lower().endswith(";base64")
            return base64.b64decode(data, validate=True) if is_base64 else data
        except ValueError as error:
            problem = f"has broken base64 ({error}); encode the file's bytes again"
            raise UserError(f"the {medium} {url[:60]} {problem}") from None
    if not url.lower().startswith(("http://", "https://")):
        raise UserError(f"{url} is no http(s) or data URL; give one, or a file")
    try:
        with request.urlopen(url, timeout=URL_SECONDS) as response:
            return response.read()
    except (OSError, ValueError, HTTPException) as error:
        raise UserError(
            f"the {medium} {url} cannot be fetched ({error}); correct the URL, or give a file"
        ) from None


# --- from PIL images ---


def to_rgb(image: Image.Image, background: Any = WHITE, what: str | None = None) -> Image.Image:
    """Return a PIL image in RGB, upright and opaque; the image itself where it is so already.

    The orientation tag decides: an image that has one is turned, also where it is a copy. Whoever
    has turned an image removes its tag, as `PIL.ImageOps.exif_transpose` does.

    Args:
        image: An image of any mode.
        background: What transparent parts are laid on: a colour as Pillow names it, or RGB.
        what: What it is, for the message of an error.

    Raises:
        UserError: The image is broken, has no pixels, or values without a known scale.
    """
    what = what or f"the image {getattr(image, 'filename', '')}".strip()
    if not image.width or not image.height:
        raise UserError(
            f"{what} has a size of {image.width} x {image.height}, so no pixels; give another"
        )
    with _explained(what):
        transparency = _find_transparency(image)
        image.load()
        rgb = _convert(image, transparency, background)
        turn = TURNS.get(_read_orientation(image))
        if turn is not None:
            rgb = rgb.transpose(turn)
        if rgb is not image:
            rgb.info = {}  # no tag is left that could be applied again
        return rgb


def _convert(image: Image.Image, transparency: Any, background: Any) -> Image.Image:
    if image.mode in DEEP_MODES:
        values = np.asarray(image)
        rgb = Image.fromarray(_scale_deep(image, values)).convert("RGB")
        if transparency is None:
            return rgb
        return _lay(rgb, Image.fromarray(values != transparency), background)
    if image.mode == "RGB" and transparency is None:
        return image
    if not image.has_transparency_data:
        return image.convert("RGB")
    if image.mode == "La":
        image = image.convert("LA")  # the only mode that it converts to
    if transparency != image.info.get("transparency"):
        image = image.copy()
        image.info["transparency"] = transparency
    rgba = image.convert("RGBA")
    return _lay(rgba.convert("RGB"), rgba.getchannel("A"), background)


def _lay(rgb: Image.Image, mask: Image.Image, background: Any) -> Image.Image:
    canvas = Image.new("RGB", rgb.size, parse_color(background))
    canvas.paste(rgb, mask=mask)
    return canvas


def parse_color(color: Any) -> tuple[int, int, int]:
    """Return a colour as RGB; UserError where Pillow does not know it.

    Args:
        color: A name such as "white", "#ffffff" and the like, or three numbers from 0 to 255.
    """
    try:
        levels = ImageColor.getrgb(color) if isinstance(color, str) else tuple(color)
    except (TypeError, ValueError):
        levels = ()
    is_known = all(isinstance(level, int) and 0 <= level <= BITS_8 for level in levels)
    if len(levels) < 3 or not is_known:
        raise UserError(
            f"background is {color!r}, which is no colour; give a name such as white, or #ffffff"
        )
    return levels[:3]


def _find_transparency(image: Image.Image) -> Any:
    """The transparent value of an image without alpha, in the scale of its pixels; or None.

    Must be called before a file's pixels are read, as the file's samples are known until then.
    """
    transparency = image.info.get("transparency")
    tiles = getattr(image, "tile", None)
    if transparency is None or not tiles:
        return transparency
    scale = SAMPLE_SCALES.get(tiles[0][3]) if isinstance(tiles[0][3], str) else None
    if scale is None:
        return transparency
    if isinstance(transparency, tuple):
        return tuple(int(sample * scale) for sample in transparency)
    return int(transparency * scale)


def _read_orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # a damaged tag does not damage the pixels, and viewers ignore it
        return 1


def _scale_deep(image: Image.Image, values: np.ndarray) -> np.ndarray:
    """The values of a deep PIL image as levels."""
    if image.mode == "F":
        return _scale_floats(values)[0]
    tags = getattr(image, "tag_v2", {})
    levels = _scale_integers(values, _find_white(image, tags))
    is_inverted = image.mode != "I" and tags.get(PHOTOMETRIC) == 0  # Pillow leaves it to us
    return BITS_8 - levels if is_inverted else levels


def _find_white(image: Image.Image, tags: Any) -> int | None:
    """The value of white, where the file says it."""
    if image.format == "PPM":
        return BITS_16  # Pillow has scaled the values
    if tags.get(BITS_PER_SAMPLE) == (12,):
        return BITS_12
    declared = tags.get(MAX_SAMPLE_VALUE)
    declared = declared[0] if isinstance(declared, tuple) and declared else declared
    return declared if isinstance(declared, int) and declared > BITS_8 else None


# --- from lists ---


def list_images(images: Any) -> list:
    """Return images as a flat list, or as one list for each text where they were given so.

    Args:
        images: One image, a list of images, a batch of arrays, or one list for each text. There,
            None stands for no image, and an image alone for a list of one.

    Raises:
        UserError: There are lists inside these lists.
    """
    items = images if isinstance(images, list | tuple) else [images]
    if not any(item is None or isinstance(item, list | tuple) for item in items):
        return _unstack(items)
    rows = []
    for item in items:
        row = item if isinstance(item, list | tuple) else [item] * (item is not None)
        if any(image is None or isinstance(image, list | tuple) for image in row):
            raise UserError(
                "the images of a text hold a list or None; give one flat list for each text"
            )
        rows.append(_unstack(row))
    return rows


def _unstack(images: Any) -> list:
    """A flat list of images, of which some are arrays of several."""
    flat = []
    for image in images:
        is_batch = (isinstance(image, np.ndarray) or is_tensor(image)) and image.ndim == 4
        flat += list(image) if is_batch else [image]
    return flat


# --- from arrays and tensors ---


def to_array(values: Any) -> np.ndarray:
    """Return an array or tensor as numpy; UserError where it holds no numbers."""
    if is_tensor(values):
        values = values.detach().cpu()
        if str(values.dtype) == "torch.bfloat16":
            values = values.float()
        values = values.numpy()
    if not isinstance(values, np.ndarray) or values.dtype.kind not in "buif":
        kind = f"an array of {values.dtype}" if isinstance(values, np.ndarray) else type(values)
        raise UserError(
            f"{kind} was given as an image; give PIL images, paths, or arrays or tensors of numbers"
        )
    return values


def put_channels_last(values: Any, layout: str | None = None) -> np.ndarray:
    """Return one image's array as [height, width, channels].

    Args:
        values: [height, width], or with 1 to 4 channels first or last, as numpy or tensor.
        layout: "channels_first" or "channels_last"; by default it is found by the shape. Where
            both are possible, tensors have channels first and numpy arrays last.

    Raises:
        UserError: It has another shape, or no pixels.
    """
    array = to_array(values)
    shape = array.shape
    if array.ndim == 2:
        array = array[..., None]
    elif array.ndim == 3:
        is_first = _has_channels_first(shape, layout, is_tensor(values))
        array = np.moveaxis(array, 0, -1) if is_first else array
    if array.ndim != 3 or array.shape[-1] not in MODES or 0 in array.shape:
        expected = f" with {layout}" if layout else ""
        raise UserError(
            f"an array of shape {shape} is no image{expected}; give height x width x 1 to 4"
            " channels, and input_data_format where they come first"
        )
    return array


def _has_channels_first(shape: tuple, layout: Any, is_tensor: bool) -> bool:
    layout = getattr(layout, "value", layout)  # of transformers' ChannelDimension
    if layout is not None:
        if layout not in ("channels_first", "channels_last"):
            raise UserError(
                f"input_data_format is {layout!r}, but must be channels_first or channels_last"
            )
        return layout == "channels_first"
    for counts in ((3, 4), (1,), (2,)):
        first, last = shape[0] in counts, shape[-1] in counts
        if first or last:
            return first and (is_tensor or not last)
    return False


def array_to_rgb(values: Any, layout: str | None = None, background: Any = WHITE) -> _Opened:
    """Return one image's array or tensor as RGB, and whether its values were fractions.

    Args:
        values: See `put_channels_last`. Integers are scaled by their depth. Floats lie between 0
            and 1, or between 0 and 255.
        layout: "channels_first" or "channels_last".
        background: What transparent parts are laid on.

    Raises:
        UserError: The shape is no image's, or the values have no known scale.
    """
    array = put_channels_last(values, layout)
    is_fraction = False
    if array.dtype.kind == "f":
        levels, is_fraction = _scale_floats(array)
    elif array.dtype.kind == "b":
        levels = array * np.uint8(BITS_8)
    else:
        levels = array if array.dtype == np.uint8 else _scale_integers(array)
    num_channels = levels.shape[-1]
    levels = np.ascontiguousarray(levels[..., 0] if num_channels == 1 else levels)
    image = Image.frombytes(MODES[num_channels], levels.shape[1::-1], levels.tobytes())
    return to_rgb(image, background), is_fraction


# --- from deep values to levels ---


def _scale_integers(values: np.ndarray, white: int | None = None) -> np.ndarray:
    """Integers as levels, uint8: black is 0, and white the largest value of their depth."""
    low, high = int(values.min()), int(values.max())
    if white is None or high > white:
        white = _guess_white(values, low, high)
    if high <= BITS_16:
        table = np.rint(np.arange(BITS_16 + 1) * (BITS_8 / white)).clip(0, BITS_8)
        return table.astype(np.uint8)[values]
    return np.rint(values * (BITS_8 / white)).astype(np.uint8)


def _guess_white(values: np.ndarray, low: int, high: int) -> int:
    """The largest value of the smallest usual depth that holds the values.

    A camera of 12 bits fills 16 bits only by a sixteenth. Values of 8 bits that were spread over 16
    are multiples of 257, or of 256.
    """
    if low >= 0:
        if high <= BITS_8:
            return BITS_8
        if high <= BITS_12 and (values % 257).any() and (values % 256).any():
            return BITS_12
        if high <= BITS_16:
            return BITS_16
        white = BITS_31 if high <= BITS_31 else BITS_32
        if high <= white and high * BITS_8 >= white * LEAST_LEVEL:
            return white
    raise UserError(
        f"an image has integers from {low} to {high}, which fill neither 8, 12, 16 nor 32 bits;"
        " scale them to 0 to 65535, where 0 is black and 65535 white"
    )


def _scale_floats(values: np.ndarray) -> tuple[np.ndarray, bool]:
    """Floats as levels, uint8, and whether they were fractions of white and not levels."""
    values = values.astype(np.float32)
    low, high = float(values.min()), float(values.max())
    if low >= -TOLERANCE and high <= 1 + TOLERANCE:
        return np.rint(values.clip(0, 1) * BITS_8).astype(np.uint8), True
    is_scale_known = high >= LEAST_LEVEL or np.array_equal(values, np.rint(values))
    if low > -1 and high < BITS_8 + 1 and is_scale_known:
        return np.rint(values.clip(0, BITS_8)).astype(np.uint8), False
    raise UserError(
        f"an image has floats from {low:g} to {high:g}; scale them to 0 to 1, or to 0 to 255, where"
        " 0 is black"
    )
