"""Scenes of drawn shapes: a few objects on a grid of cells, made from a seed, and their images.

An image of the small size has 2 x 2 cells of 48 x 48 pixels, one of the large size 4 x 4. The
coarse view has half as many pixels a side. Shapes and colours survive that, and textures mostly do.
Small things do not: digits of 3 x 5 dots, and fine lines with a period of three pixels.
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
DOTS = [dot == "1" for dot in FONT.replace(" ", "")]
GLYPHS = np.array(DOTS).reshape(10, 5, 3)

PLATE = 11  # side of the fields that show lines and digit, in pixels
PLATE_TOP = 35
LINES_LEFT = 3
DIGIT_LEFT = 34


@dataclass(frozen=True)
class Thing:
    """One object.

    Attributes:
        place: Its cell, counted row by row.
        shape: Index into `SHAPES`.
        colour: Index into `COLOURS`.
        shade: Index into `SHADES`.
        texture: Index into `TEXTURES`.
        lines: Index into `LINES`.
        digit: Index into `DIGITS`.
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
    """Objects in different cells with different shapes.

    Attributes:
        things: The objects, by cell.
        noise: Seed of background, jitter and pixel noise.
        rows: Cells per side.
    """

    things: tuple[Thing, ...]
    noise: int
    rows: int = SMALL.rows

    @property
    def places(self) -> tuple[str, ...]:
        """Names of the cells, row by row."""
        return PLACES[self.rows]


def make_scene(key: str, size: Size = SMALL) -> Scene:
    """Make the scene of a key such as "train/0/17": equal keys give equal scenes everywhere."""
    rng = random.Random(key)
    count = rng.choices(size.num_things, size.weights)[0]
    places = sorted(rng.sample(range(size.rows**2), count))
    shapes = rng.sample(range(len(SHAPES)), count)
    things = []
    for place, shape in zip(places, shapes, strict=True):
        looks = [rng.randrange(len(names)) for names in (COLOURS, SHADES, TEXTURES, LINES, DIGITS)]
        things.append(Thing(place, shape, *looks))
    return Scene(tuple(things), rng.randrange(2**31), size.rows)


def draw(scene: Scene) -> Image.Image:
    """Draw a scene as an RGB image: 96 x 96 pixels in the small size, 192 x 192 in the large."""
    side = scene.rows * CELL
    rng = np.random.default_rng(scene.noise)
    pixels = _draw_background(side, rng)
    for thing in scene.things:
        row, column = divmod(thing.place, scene.rows)
        top = row * CELL
        left = column * CELL
        _draw_thing(pixels[top : top + CELL, left : left + CELL], thing, rng)
    pixels = pixels + rng.normal(0, 5, pixels.shape)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def _draw_background(side: int, rng: np.random.Generator) -> np.ndarray:
    """A colour that changes evenly over the image, [side, side, 3]."""
    colour = rng.uniform(95, 150, 3) + rng.uniform(-12, 12)
    down, right = rng.uniform(-0.25, 0.25, (2, 3)) * (96 / side)
    y, x = np.mgrid[:side, :side][..., None] - side // 2
    return colour + down * y + right * x


def _draw_thing(cell: np.ndarray, thing: Thing, rng: np.random.Generator) -> None:
    jitter = rng.integers(-2, 3, 2)
    y, x = np.mgrid[:CELL, :CELL]
    dy = y - 19 - jitter[0]
    dx = x - 24 - jitter[1]
    inside = _get_inside(SHAPES[thing.shape], dy, dx)
    colour = _mix_colour(thing)
    cell[inside] = colour
    cell[inside & _get_texture(TEXTURES[thing.texture], dy, dx)] = colour * 0.45
    phase = int(rng.integers(3))
    _stamp(cell, LINES_LEFT, _get_lines(LINES[thing.lines], phase))
    _stamp(cell, DIGIT_LEFT, _place_digit(thing.digit, rng))


def _mix_colour(thing: Thing) -> np.ndarray:
    """A thing's colour in its shade, as levels of red, green and blue."""
    colour = list(COLOURS.values())[thing.colour]
    shade = list(SHADES.values())[thing.shade]
    return np.array(colour) * shade


def _place_digit(digit: int, rng: np.random.Generator) -> np.ndarray:
    """Where a plate has the ink of a digit, which stands a little elsewhere each time."""
    ink = np.zeros((PLATE, PLATE), dtype=bool)
    top = rng.integers(2, 5)
    left = rng.integers(2, 7)
    ink[top : top + 5, left : left + 3] = GLYPHS[digit]
    return ink


def _stamp(cell: np.ndarray, left: int, ink: np.ndarray) -> None:
    grey = np.where(ink, 70, 190)[..., None]
    cell[PLATE_TOP : PLATE_TOP + PLATE, left : left + PLATE] = grey


def _get_lines(lines: str, phase: int) -> np.ndarray:
    y, x = np.mgrid[:PLATE, :PLATE]
    along = {"flat": y, "upright": x, "rising": x + y, "falling": x - y}[lines]
    return (along + phase) % 3 < 1


def _get_texture(texture: str, dy: np.ndarray, dx: np.ndarray) -> np.ndarray:
    rows = dy % 6 < 3
    columns = dx % 6 < 3
    return {
        "plain": np.zeros_like(rows),
        "rows": rows,
        "columns": columns,
        "dots": rows & columns,
        "checks": rows ^ columns,
    }[texture]


def _get_inside(shape: str, dy: np.ndarray, dx: np.ndarray) -> np.ndarray:
    """Which pixels of a cell belong to a shape; dy and dx count from its centre."""
    height = abs(dy)
    width = abs(dx)
    squared = dy**2 + dx**2
    are_inside = {  # functions, because angles take longer than all the rest
        "circle": lambda: squared < 14.5**2,
        "square": lambda: (height < 13) & (width < 13),
        "triangle": lambda: (dy > -14) & (dy < 13) & (width < (dy + 14) * 0.58),
        "diamond": lambda: height + width < 17,
        "cross": lambda: ((height < 5) & (width < 15)) | ((width < 5) & (height < 15)),
        "ring": lambda: (squared < 15.5**2) & (squared > 8**2),
        "bar": lambda: (height < 6) & (width < 18),
        "star": lambda: np.sqrt(squared) < 10.5 + 5.5 * np.cos(5 * np.arctan2(dx, -dy)),
    }
    return are_inside[shape]()
