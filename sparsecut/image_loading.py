"""Open images as models take them: RGB, turned upright."""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageOps

from .schema import UserError

ImageSource = Image.Image | str | Path


def open_upright(file) -> Image.Image:
    """Read an image file as RGB, turned as its EXIF orientation says."""
    return ImageOps.exif_transpose(Image.open(file)).convert("RGB")


def open_image(source: ImageSource) -> Image.Image:
    """Return an image as it is, or read it from a path.

    Raises:
        UserError: There is no such file, or it is no image that can be read.
    """
    if isinstance(source, Image.Image):
        return source
    path = Path(source).expanduser()
    if not path.is_file():
        raise UserError(f"there is no image {source}; give the path of an image file")
    try:
        return open_upright(path)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(
            f"the image {source} cannot be read ({error}); give a PNG or JPEG file"
        ) from error
