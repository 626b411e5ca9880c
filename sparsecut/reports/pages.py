"""Renders the templates of pages, with every value escaped."""

from __future__ import annotations

import base64
import io
from functools import lru_cache

import jinja2
from markupsafe import Markup
from PIL import Image


def render(template: str, **values) -> str:
    """Render a template of `reports/templates`.

    Args:
        template: The file's name.
        values: What the template shows. Texts are escaped; `Markup` is not.

    Returns:
        The text of a page or of a part of one; equal values give equal text.
    """
    return _get_environment().get_template(template).render(**values)


@lru_cache
def _get_environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader("sparsecut.reports"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )


def embed_image(image: Image.Image) -> Markup:
    """Return an image as a `data:` URL, so that a page needs no other file."""
    file = io.BytesIO()
    image.save(file, "PNG")
    encoded = base64.b64encode(file.getvalue()).decode()
    return Markup(f"data:image/png;base64,{encoded}")
