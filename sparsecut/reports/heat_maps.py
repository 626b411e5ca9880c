"""Heat maps laid over their images, as cells of a page."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from ..evaluation.heat_maps import KINDS, HeatMap
from ..evaluation.mapped_questions import MappedQuestion
from .pages import embed_image

SUPPORTS = (230, 90, 20)  # where the answer gains by what is added
OPPOSES = (40, 110, 220)
SIDE = 180  # pixels of the longer side of a drawn image
STRONGEST = 0.85  # share of colour in the strongest cell
FAINT = 0.01  # of the largest value of its kind; below, a map is not drawn
TITLES = {
    "size": "size, relative to the hidden state",
    "gradient": "gradient x input",
    "occlusion": "occlusion: loss of log-probability",
}


def make_cards(questions: Sequence[MappedQuestion], names: dict[int, str]) -> list[dict]:
    """Make what the page shows of questions with maps.

    Args:
        questions: The questions.
        names: Shortcut to the name that the page shows.

    Returns:
        For each image of each question: its text, answers, image, titles of columns, and rows of a
        shortcut's name and cells. A cell has a caption, and a drawing unless the map says nothing.
    """
    cards = []
    for question in questions:
        for number, image in enumerate(question.images):
            small = _shrink(image)
            rows = []
            for shortcut in sorted({one.shortcut for one in question.maps.maps}):
                cells = [_make_cell(question, shortcut, kind, number, small) for kind in KINDS]
                rows.append({"name": names[shortcut], "cells": cells})
            cards.append(
                {
                    "question": question.question,
                    "answer": question.maps.answer,
                    "reference": question.reference,
                    "url": embed_image(small),
                    "titles": list(TITLES.values()),
                    "rows": rows,
                }
            )
    return cards


def _make_cell(
    question: MappedQuestion, shortcut: int, kind: str, image: int, small: Image.Image
) -> dict:
    """One map of a question; all maps of one kind share their scale."""
    own = question.maps.get(shortcut, kind, image)
    if own is None:
        return {"caption": "it is the input itself", "url": ""}
    largest = max(_get_largest(one) for one in question.maps.maps if one.kind == kind)
    if own.is_empty or _get_largest(own) < FAINT * largest:
        return {"caption": "nothing to see: it adds or changes nothing", "url": ""}
    value = own.values.flat[np.nanargmax(np.abs(own.values))]
    caption = f"{100 * value:.0f} % at most" if kind == "size" else f"{value:+.2g} at most"
    return {"caption": caption, "url": embed_image(lay_over(small, own.values, largest))}


def _get_largest(one: HeatMap) -> float:
    return float(np.nan_to_num(np.abs(one.values)).max())


def _shrink(image: Image.Image) -> Image.Image:
    scale = SIDE / max(image.size)
    size = tuple(max(1, round(side * scale)) for side in image.size)
    filter = Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.NEAREST
    return image.convert("RGB").resize(size, filter)


def lay_over(image: Image.Image, values: np.ndarray, largest: float) -> Image.Image:
    """Lay a map over an image that is turned grey: orange for positive values, blue for negative.

    Args:
        image: The image.
        values: [rows, columns]; NaN is left without colour.
        largest: The size of a value that gets the strongest colour.
    """
    rows, columns = values.shape
    y = np.arange(image.height) * rows // image.height
    x = np.arange(image.width) * columns // image.width
    shown = np.nan_to_num(values)[y][:, x]
    share = (np.abs(shown) / max(largest, 1e-12)).clip(0, 1)[..., None] * STRONGEST
    colour = np.where(shown[..., None] >= 0, SUPPORTS, OPPOSES)
    grey = np.asarray(image.convert("L").convert("RGB"), dtype=float)
    return Image.fromarray((grey * (1 - share) + colour * share).round().astype(np.uint8))
