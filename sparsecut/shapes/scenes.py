"""Scenes of the picture world: a few objects on a layout of cells, as frozen data from a seed, and
how they are drawn.

A picture of the small world has 2 x 2 cells of 48 x 48 pixels, one of the large world 4 x 4; the coarse view has half as
many pixels per side. Shapes and colours survive that, textures mostly do, and what is meant to
be small does not: the digits of 3 x 5 dots and the fine lines, whose period of three pixels half
the resolution blurs.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
from PIL import Image

from .sizes import CELL, PLACES, SMALL, Size

SHAPES = ("circle", "square", "triangle", "diamond", "cross", "ring", "bar", "star")
COLOURS = {
    "red": (214, 52, 52),
    "green": (46, 160, 67),
    "blue": (52, 92, 214),
    "yellow": (222, 190, 40),
    "purple": (146, 62, 182),
    "orange": (228, 124, 38),
}
SHADES = {"dark": 0.62, "medium": 0.82, "light": 1.0}
TEXTURES = ("plain", "rows", "columns", "dots", "checks")
LINES = ("flat", "upright", "rising", "falling")
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
FONT = (
    "111101101101111 010110010010111 111001111100111 111001011001111 101101111001001 "
    "111100111001111 111100111101111 111001010010010 111101111101111 111101111001111"
)
GLYPHS = np.array([[c == "1" for c in glyph] for glyph in FONT.split()]).reshape(10, 5, 3)


@dataclass(frozen=True)
class Thing:
    """One object: where it stands (which cell, row by row) and what it looks like, each a place in
    the lists above.
    """

    place: int
    shape: int
    colour: int
    shade: int
    texture: int
    lines: int
    digit: int


@dataclass(frozen=True)
class Scene:
    """Things in different places with different shapes; `noise` seeds background, jitter and grain;
    `rows` x `rows` cells.
    """

    things: tuple[Thing, ...]
    noise: int
    rows: int = SMALL.rows

    @property
    def places(self) -> tuple[str, ...]:
        """Names of the cells, row by row."""
        return PLACES[self.rows]


def make_scene(key: str, size: Size = SMALL) -> Scene:
    """The scene of a key such as "train/0/17": equal keys give equal scenes, on every machine."""
    rng = random.Random(key)
    places = sorted(rng.sample(range(size.rows**2), rng.choices(size.num_things, size.weights)[0]))
    shapes = rng.sample(range(len(SHAPES)), len(places))
    things = tuple(
        Thing(
            p,
            s,
            *(rng.randrange(len(names)) for names in (COLOURS, SHADES, TEXTURES, LINES, DIGITS)),
        )
        for p, s in zip(places, shapes, strict=True)
    )
    return Scene(things, rng.randrange(2**31), size.rows)


def draw(scene: Scene) -> Image.Image:
    """The picture of a scene, RGB, 96 x 96 in the small world and 192 x 192 in the large one."""
    side = scene.rows * CELL
    rng = np.random.default_rng(scene.noise)
    base = rng.uniform(95, 150, 3) + rng.uniform(-12, 12)
    slope = rng.uniform(-0.25, 0.25, (2, 3)) * (96 / side)
    y, x = np.mgrid[:side, :side]
    picture = base + slope[0] * (y - side // 2)[..., None] + slope[1] * (x - side // 2)[..., None]
    for thing in scene.things:
        row, column = divmod(thing.place, scene.rows)
        cell = picture[row * CELL : (row + 1) * CELL, column * CELL : (column + 1) * CELL]
        _draw_thing(cell, thing, rng)
    picture = picture + rng.normal(0, 5, picture.shape)
    return Image.fromarray(picture.clip(0, 255).astype(np.uint8))


def _draw_thing(cell: np.ndarray, thing: Thing, rng: np.random.Generator) -> None:
    jitter = rng.integers(-2, 3, 2)
    y, x = np.mgrid[:CELL, :CELL]
    dy, dx = y - 19 - jitter[0], x - 24 - jitter[1]
    inside = _inside(SHAPES[thing.shape], dy, dx)
    colour = np.array(list(COLOURS.values())[thing.colour]) * list(SHADES.values())[thing.shade]
    cell[inside] = colour
    cell[inside & _texture(TEXTURES[thing.texture], dy, dx)] = colour * 0.45
    _stamp(cell, 35, 3, _hatching(LINES[thing.lines], int(rng.integers(3))))
    plate = np.zeros((11, 11), dtype=bool)
    top, left = rng.integers(2, 5), rng.integers(2, 7)
    plate[top : top + 5, left : left + 3] = GLYPHS[thing.digit]
    _stamp(cell, 35, 34, plate)


def _stamp(cell: np.ndarray, top: int, left: int, ink: np.ndarray) -> None:
    cell[top : top + 11, left : left + 11] = np.where(ink, 70, 190)[..., None]


def _hatching(lines: str, phase: int) -> np.ndarray:
    y, x = np.mgrid[:11, :11]
    along = {"flat": y, "upright": x, "rising": x + y, "falling": x - y}[lines]
    return (along + phase) % 3 < 1


def _texture(texture: str, dy: np.ndarray, dx: np.ndarray) -> np.ndarray:
    rows, columns = dy % 6 < 3, dx % 6 < 3
    return {
        "plain": np.zeros_like(rows),
        "rows": rows,
        "columns": columns,
        "dots": rows & columns,
        "checks": rows ^ columns,
    }[texture]


def _inside(shape: str, dy: np.ndarray, dx: np.ndarray) -> np.ndarray:
    ay, ax, r2 = abs(dy), abs(dx), dy**2 + dx**2
    angle, radius = np.arctan2(dx, -dy), np.sqrt(r2)
    return {
        "circle": r2 < 14.5**2,
        "square": (ay < 13) & (ax < 13),
        "triangle": (dy > -14) & (dy < 13) & (ax < (dy + 14) * 0.58),
        "diamond": ay + ax < 17,
        "cross": ((ay < 5) & (ax < 15)) | ((ax < 5) & (ay < 15)),
        "ring": (r2 < 15.5**2) & (r2 > 8**2),
        "bar": (ay < 6) & (ax < 18),
        "star": radius < 10.5 + 5.5 * np.cos(5 * angle),
    }[shape]
