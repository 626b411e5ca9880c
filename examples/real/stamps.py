"""Tux Paint's stamps as records: photos and drawings of things, with questions about each.

Four kinds of questions are made from the descriptions and the pixels:

    kind    what kind of thing is it: the folder that it lies in
    name    which of two names is right; the wrong one is of another kind
    color   the colour of most of it, where one colour covers half of it
    turn    which way its top points; a quarter turn was drawn by lot

An id is SPLIT.QUESTION.STAMP. Stamps with the same name are in the same split, so a test asks about
things that training never showed. Letters, signs and money are left out.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from easy_vqa import make_record
from fetch_packages import show_progress
from PIL import Image

SIDE = 224  # pixels
LEFT_OUT = {"symbols"}
MIN_STAMPS = 12  # kinds with fewer are left out
MAX_WORDS = 4  # longer descriptions say more than a name
SHARE = 0.5  # of the pixels that one colour must cover
UPRIGHT = {"animals", "town", "vehicles", "plants", "clothes"}  # things that have a top
FROM_ABOVE = "insects"  # a folder whose animals have no top
TOPS = ("up", "left", "down", "right")  # after so many quarter turns to the left
GREYS = (("black", 60), ("gray", 190), ("white", 256))  # upper limits of brightness, of 255
HUES = (
    *(("red", 14), ("orange", 40), ("yellow", 67), ("green", 165), ("blue", 260)),
    *(("purple", 300), ("pink", 345), ("red", 361)),
)  # upper limits in degrees


@dataclass(frozen=True)
class Stamp:
    """One stamp.

    Attributes:
        path: Its file, an image with transparency.
        kind: The folder that it lies in, such as "animals".
        name: Its description without article and full stop, in lower case.
        split: "train", "dev" or "test".
    """

    path: Path
    kind: str
    name: str
    split: str

    @property
    def key(self) -> str:
        """A short name of its own."""
        return f"{self.path.stem}-{make_digest(str(self.path.parent / self.path.name)) % 2**16:04x}"


def write_stamps(source: Path, out: Path) -> dict[str, int]:
    """Write train.json, dev.json and test.json in LLaVA's format, with their images.

    Args:
        source: The folder of stamps in the package.
        out: The folder to write.

    Returns:
        How many records each file has.
    """
    (out / "images").mkdir(parents=True, exist_ok=True)
    stamps = read_stamps(source)
    records: dict[str, list[dict]] = {"train": [], "dev": [], "test": []}
    for number, stamp in enumerate(stamps, start=1):
        for question in list_questions(stamp, stamps, source, out):
            records[stamp.split].append(question)
        show_progress("stamps", number, len(stamps), "images")
    for split, rows in records.items():
        (out / f"{split}.json").write_text(json.dumps(rows), encoding="utf-8")
    return {split: len(rows) for split, rows in records.items()}


def read_stamps(source: Path) -> list[Stamp]:
    """Read which stamps there are, by path."""
    stamps = []
    for path in sorted(source.rglob("*.png")):
        text = path.with_suffix(".txt")
        kind = path.relative_to(source).parts[0]
        if kind in LEFT_OUT or path.stem.endswith(("_mirror", "_flip")) or not text.exists():
            continue
        lines = text.read_text(encoding="utf-8", errors="replace").splitlines()
        name = get_name(lines[0]) if lines else ""
        if name:
            stamps.append(Stamp(path.relative_to(source), kind, name, choose_split(name)))
    counts = Counter(stamp.kind for stamp in stamps)
    return [stamp for stamp in stamps if counts[stamp.kind] >= MIN_STAMPS]


def get_name(description: str) -> str:
    """A description without article and full stop, in lower case."""
    return re.sub(r"^(an?|the|some)\s+", "", description.strip().casefold()).rstrip(" .!")


def choose_split(name: str) -> str:
    """Training has 70 % of the names, dev 10 % and the test 20 %."""
    place = make_digest(name) % 10
    return "train" if place < 7 else "dev" if place == 7 else "test"


def make_digest(text: str) -> int:
    """A number that depends on a text alone."""
    return int(hashlib.sha256(text.encode()).hexdigest()[:12], 16)


def list_questions(stamp: Stamp, stamps: list[Stamp], source: Path, out: Path) -> list[dict]:
    """Save a stamp's images and make the questions about it."""
    lot = random.Random(make_digest(stamp.key))
    original = Image.open(source / stamp.path).convert("RGBA")
    original.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    image = f"images/{stamp.key}.png"
    save_on_white(original, out / image)
    asked = [("kind", image, "what kind of thing is this?", stamp.kind)]
    if len(stamp.name.split()) <= MAX_WORDS:
        others = [x.name for x in stamps if x.kind != stamp.kind and x.split == stamp.split]
        others = [name for name in others if len(name.split()) <= MAX_WORDS]
        if others:
            names = [stamp.name, lot.choice(others)]
            lot.shuffle(names)
            asked.append(("name", image, f"is this {names[0]} or {names[1]}?", stamp.name))
    color = find_color(original)
    if color:
        asked.append(("color", image, "what color is most of it?", color))
    if stamp.kind in UPRIGHT and FROM_ABOVE not in stamp.path.parts:
        turns = lot.randrange(4)
        turned = f"images/{stamp.key}.turned.png"
        save_on_white(original.rotate(90 * turns, expand=True), out / turned)
        asked.append(("turn", turned, "which way does its top point?", TOPS[turns]))
    return [
        make_record(f"{stamp.split}.{kind}.{stamp.key}", path, question, answer)
        for kind, path, question, answer in asked
    ]


def save_on_white(image: Image.Image, path: Path) -> None:
    """Save an image with transparency in the middle of a white square."""
    square = Image.new("RGB", (SIDE, SIDE), "white")
    square.paste(image, ((SIDE - image.width) // 2, (SIDE - image.height) // 2), image)
    square.save(path)


def find_color(image: Image.Image) -> str | None:
    """The colour that covers most of what is not transparent; None where none covers half of it."""
    values = np.asarray(image)
    visible = values[..., 3] > 127
    counts = Counter(name_color(*pixel) for pixel in values[visible][::7, :3].tolist())
    if not counts:
        return None
    name, count = counts.most_common(1)[0]
    return name if count >= SHARE * counts.total() else None


def name_color(red: int, green: int, blue: int) -> str:
    """Name the colour of a pixel, by its hue, saturation and brightness."""
    high, low = max(red, green, blue), min(red, green, blue)
    if high < GREYS[0][1] or high - low < 0.15 * high:
        return next(name for name, limit in GREYS if high < limit)
    if high == red:
        hue = 60 * (green - blue) / (high - low) % 360
    elif high == green:
        hue = 60 * (blue - red) / (high - low) + 120
    else:
        hue = 60 * (red - green) / (high - low) + 240
    name = next(name for name, limit in HUES if hue < limit)
    is_dark = high < 180
    return "brown" if is_dark and name in ("red", "orange", "yellow") and hue > 8 else name
