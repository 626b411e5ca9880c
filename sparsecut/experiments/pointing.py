"""The pointing game: do heat maps peak where the detail is that decides the answer?

Questions about drawn shapes ask for one detail, whose place is known. Any other questions may be
asked whose records say where the detail is (`read_items`). Only answers count that a shortcut
decides: right with all shortcuts, and wrong without this one. A map hits where its highest
cell meets the detail, or with a margin of one cell. Two controls stand beside it: the same map with
its cells shuffled, and the map of another question of the same kind about another place.
"""

from __future__ import annotations

import io
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..config.recipe import Source
from ..data.examples import Example, read_source
from ..data.readers import read_records
from ..evaluation.evaluator import evaluate
from ..evaluation.heat_maps import KINDS, HeatMap, make_heat_maps
from ..schema import UserError
from ..shapes.questions import KINDS as QUESTIONS
from ..shapes.questions import split_scene
from ..shapes.scenes import DIGIT_LEFT, LINES_LEFT, PLATE, PLATE_TOP, draw
from ..shapes.sizes import CELL, SMALL, Size

SHAPE_BOX = (8, 3, 40, 35)  # of a cell, in pixels
DETAILS = {  # kind of question -> where its detail is in a cell: left, top, right, bottom
    "digit": (DIGIT_LEFT, PLATE_TOP, DIGIT_LEFT + PLATE, PLATE_TOP + PLATE),
    "lines": (LINES_LEFT, PLATE_TOP, LINES_LEFT + PLATE, PLATE_TOP + PLATE),
    "shade": SHAPE_BOX,
    "texture": SHAPE_BOX,
}

Box = tuple[float, float, float, float]  # left, top, right, bottom, as fractions of the image


@dataclass(frozen=True)
class Item:
    """One question about a detail.

    Attributes:
        example: The question about one image, with its right answer.
        region: Where the detail is.
    """

    example: Example
    region: Box


def make_items(num_images: int, seed: int = 0, size: Size = SMALL) -> list[Item]:
    """Draw images of the test split and ask for each detail of one object in each.

    Args:
        num_images: How many images.
        seed: Seed of the scenes.
        size: The size of the images.
    """
    items = []
    for number in range(num_images):
        key = f"test/{seed}/{number}"
        scene = split_scene(key, size)
        file = io.BytesIO()
        draw(scene).save(file, "PNG")
        rng = random.Random(f"{key}/pointing")
        for kind, detail in DETAILS.items():
            question, answer = QUESTIONS[kind][1](scene, rng)
            place = scene.places.index(question.rpartition(" ")[2])
            row, column = divmod(place, scene.rows)
            side = scene.rows * CELL
            corner = (column * CELL, row * CELL) * 2
            region = tuple((a + b) / side for a, b in zip(detail, corner, strict=True))
            messages = [
                {"role": "user", "content": f"<image>\n{question}"},
                {"role": "assistant", "content": answer},
            ]
            example = Example(f"{key}/{kind}", [file.getvalue()], messages, group=kind)
            items.append(Item(example, region))
    return items


def read_items(file: str | Path) -> list[Item]:
    """Read questions whose records say where the answer is to be seen.

    Args:
        file: A file of records in any form (docs/data.md). Besides, each has an `id`, and `region`:
            [left, top, right, bottom] as fractions of the upright image, from 0 to 1.

    Raises:
        UserError: An id is missing or there twice, a region is missing or no such list, or a record
            has not one image.
    """
    source = Source(path=str(file))
    examples = read_source(source, [])  # which checks the records
    regions: dict[str, Box] = {}
    for place, record in read_records(Path(file), images_by_name=True):
        found = record() if callable(record) else record
        name = found.get("id")
        if name is None or str(name) in regions:
            raise UserError(
                f"{place} has the id {name!r}, but regions need one for each record, each once"
            )
        regions[str(name)] = _check_region(found.get("region"), place)
    items = []
    for example in examples:
        if len(example.images) != 1:
            raise UserError(
                f"{example.place} has {len(example.images)} images, but a region is of one image;"
                " leave the record out"
            )
        items.append(Item(example, regions[example.id]))
    return items


def _check_region(region: object, place: str) -> Box:
    """A region as it stands in a record; UserError for anything else."""
    is_list = isinstance(region, list | tuple) and len(region) == 4
    if is_list and all(isinstance(edge, int | float) for edge in region):
        left, top, right, bottom = region
        if 0 <= left < right <= 1 and 0 <= top < bottom <= 1:
            return left, top, right, bottom
    raise UserError(
        f"{place} has the region {region!r}, but [left, top, right, bottom] is needed, as fractions"
        " of the image from 0 to 1; divide pixels by its width and height"
    )


def play(
    model,
    processor,
    items: Sequence[Item],
    *,
    kinds: Sequence[str] = KINDS,
    most: int = 100,
    seed: int = 0,
    max_new_tokens: int = 2,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[dict]:
    """Play the game with one model.

    Args:
        model: A model, built or upgraded, that answers such questions.
        processor: Its processor.
        items: From `make_items` or `read_items`.
        kinds: The maps to try.
        most: The most items for each shortcut, the first that it decides.
        seed: Seed of the shuffled maps.
        max_new_tokens: The longest answer, in tokens.
        progress: Called with the number of maps made, and of all.

    Returns:
        For every shortcut, kind of map and kind of question ("all" too): `num_items`, and the
        shares `hit`, `near` (with a margin of one cell), both by `chance` (the share of cells),
        `shuffled` and `other` maps. Nothing where a shortcut decides no answer.

    Raises:
        UserError: The model's plan has no shortcut besides the input.
    """
    numbers = model.fusion.gated
    if not numbers:
        raise UserError(
            "this model's plan has no shortcut besides the one into the input; give a model with"
            " more shortcuts"
        )
    examples = [item.example for item in items]
    right = _list_right(model, processor, examples, max_new_tokens)
    chosen = {}
    for number in numbers:
        with model.fusion.switched_off(number):
            without = _list_right(model, processor, examples, max_new_tokens)
        pairs = zip(items, right, without, strict=True)
        chosen[number] = [item for item, before, after in pairs if before and not after][:most]
    total = sum(map(len, chosen.values()))
    rows, done = [], 0
    for number, own in chosen.items():
        maps: dict[str, list[HeatMap]] = {kind: [] for kind in kinds}
        for item in own:
            made = make_heat_maps(model, processor, item.example, kinds=kinds, shortcuts=[number])
            for kind in kinds:
                maps[kind].append(made.get(number, kind))
            done += 1
            progress(done, total)
        for kind in kinds:
            rows += _score_groups(own, maps[kind], number, kind, seed)
    return rows


def _list_right(model, processor, examples: list[Example], max_new_tokens: int) -> list[bool]:
    settings = {"batch_size": 128, "max_new_tokens": max_new_tokens}
    records = evaluate(model, processor, examples, **settings).records
    return [record["correct"] for record in records]


def _score_groups(
    items: Sequence[Item], maps: Sequence[HeatMap], number: int, kind: str, seed: int
) -> Iterator[dict]:
    """The rows of one shortcut and kind of map: all questions, then each kind of them."""
    results = [_score(place, items, maps, seed) for place in range(len(items))]
    groups = [item.example.group for item in items]
    named = [name for name in groups if name is not None]
    for group in dict.fromkeys(("all", *DETAILS, *named)):
        own = _select_group(results, groups, group)
        if not own:
            continue
        yield {
            "shortcut": number,
            "kind": kind,
            "question": group,
            "num_items": len(own),
            **_average(own),
        }


def _select_group(results: list[dict], groups: list[str | None], wanted: str) -> list[dict]:
    """The results of one kind of question, or of all."""
    if wanted == "all":
        return results
    return [result for result, group in zip(results, groups, strict=True) if group == wanted]


def _average(rows: Sequence[dict]) -> dict[str, float]:
    """The mean of every number of some rows, which all have the same keys."""
    means = {}
    for key in rows[0]:
        means[key] = float(np.mean([row[key] for row in rows]))
    return means


def _score(place: int, items: Sequence[Item], maps: Sequence[HeatMap], seed: int) -> dict:
    """Whether one map and its controls hit: numbers from 0 to 1."""
    item, own = items[place], maps[place]
    shuffled = own.values.flatten()
    np.random.default_rng((seed, place)).shuffle(shuffled)
    other = _find_other(place, items, maps)
    scores = {}
    for name, margin in (("hit", 0), ("near", 1)):
        target = mark_target(item.region, own.values.shape, margin)
        scores[name] = _hits(own.values, target)
        scores[f"{name}_chance"] = float(target.mean())
        scores[f"{name}_shuffled"] = _hits(shuffled.reshape(own.values.shape), target)
        scores[f"{name}_other"] = _hits(other.values, target)
    return scores


def _find_other(place: int, items: Sequence[Item], maps: Sequence[HeatMap]) -> HeatMap:
    """The map of the next question of the same kind about another place; else its own."""
    for step in range(1, len(items)):
        other = (place + step) % len(items)
        is_alike = items[other].example.group == items[place].example.group
        if is_alike and items[other].region != items[place].region:
            return maps[other]
    return maps[place]


def mark_target(region: Box, shape: tuple[int, int], margin: int = 0) -> np.ndarray:
    """Which cells of a map meet a region, [rows, columns].

    Args:
        region: The region.
        shape: Rows and columns of the map.
        margin: Further cells on every side.
    """
    rows, columns = shape
    left, top, right, bottom = region
    first_row, last_row = int(top * rows) - margin, int(np.ceil(bottom * rows)) + margin
    first_column, last_column = int(left * columns) - margin, int(np.ceil(right * columns)) + margin
    target = np.zeros(shape, dtype=bool)
    target[max(first_row, 0) : last_row, max(first_column, 0) : last_column] = True
    return target


def _hits(values: np.ndarray, target: np.ndarray) -> float:
    """Whether the highest cell is in the target; a map without a positive value misses."""
    if not (np.nan_to_num(values) > 0).any():
        return 0.0
    return float(target.flatten()[np.nanargmax(values)])
