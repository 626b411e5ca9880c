"""Images as models get them: RGB, upright."""

from __future__ import annotations

from PIL import Image, ImageOps


def upright(file) -> Image.Image:
    """The picture of a file in RGB, turned as its EXIF orientation says, so that a photograph is
    seen as people see it.
    """
    return ImageOps.exif_transpose(Image.open(file)).convert("RGB")
