"""Questions about scenes at three levels, captions, and the files they are written to.

high: the shape at a place, the place of a shape. mid: texture, count of a colour. low: shade,
direction of lines, digit.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

from ..schema import UserError, read_text_file, write_text_file
from ..waits import ignore_ctrl_c, show_step
from .scenes import COLOURS, DIGITS, LINES, SHADES, SHAPES, TEXTURES, Scene, Thing, draw, make_scene
from .sizes import SMALL, Size, find_size

SPLITS = ("pretrain", "train", "dev", "test")
COLOUR_NAMES = tuple(COLOURS)
SHADE_NAMES = tuple(SHADES)
IMAGES_AT_ONCE = 100  # that a process draws between two of its messages
IMAGES_PER_WORKER = 500  # one process has drawn so many before another has started

Pair = tuple[str, str]  # a question and its answer
Asker = Callable[[Scene, random.Random], Pair]


def _about_a_place(question: str, get_answer: Callable[[Thing], str]) -> Asker:
    def ask_about(scene: Scene, rng: random.Random) -> Pair:
        thing = rng.choice(scene.things)
        return f"{question} {scene.places[thing.place]}", get_answer(thing)

    return ask_about


def _ask_place(scene: Scene, rng: random.Random) -> Pair:
    thing = rng.choice(scene.things)
    return f"where is the {SHAPES[thing.shape]}", scene.places[thing.place]


def _ask_count(scene: Scene, rng: random.Random) -> Pair:
    colours = [thing.colour for thing in scene.things]
    counts = [colours.count(colour) for colour in range(len(COLOUR_NAMES))]
    number = rng.choice(sorted(set(counts)))
    colour = rng.choice([colour for colour, count in enumerate(counts) if count == number])
    return f"how many are {COLOUR_NAMES[colour]}", DIGITS[number]


KINDS: dict[str, tuple[str, Asker]] = {  # kind -> (level, what asks it)
    "shape": ("high", _about_a_place("what shape is", lambda thing: SHAPES[thing.shape])),
    "place": ("high", _ask_place),
    "texture": ("mid", _about_a_place("what texture is", lambda thing: TEXTURES[thing.texture])),
    "count": ("mid", _ask_count),
    "shade": ("low", _about_a_place("what shade is", lambda thing: SHADE_NAMES[thing.shade])),
    "lines": ("low", _about_a_place("what lines are", lambda thing: LINES[thing.lines])),
    "digit": ("low", _about_a_place("what digit is", lambda thing: DIGITS[thing.digit])),
}
LEVELS = ("high", "mid", "low")


def caption(scene: Scene, rng: random.Random, detail: float = 0.5) -> str:
    """Say what stands where.

    Args:
        scene: The scene.
        rng: Decides which details are named.
        detail: The probability with which texture, shade, lines and digit are named, each.
    """

    def describe(thing: Thing) -> str:
        details = [SHADE_NAMES[thing.shade], TEXTURES[thing.texture]]
        before = [word for word in details if rng.random() < detail]
        noun = [COLOUR_NAMES[thing.colour], SHAPES[thing.shape]]
        details = [LINES[thing.lines], DIGITS[thing.digit]]
        after = [word for word in details if rng.random() < detail]
        return f"{scene.places[thing.place]} {' '.join(before + noun + after)}"

    return " , ".join(describe(thing) for thing in scene.things)


def ask(scene: Scene, rng: random.Random, number: int) -> list[Pair]:
    """Make `number` different questions with answers, kinds in turn, so that none is rare."""
    kinds = list(KINDS)
    order = []
    for _ in range(number):
        order += rng.sample(kinds, len(kinds))
    pairs: list[Pair] = []
    for kind in order:
        _, ask_kind = KINDS[kind]
        pair = ask_kind(scene, rng)
        if pair not in pairs:
            pairs.append(pair)
        if len(pairs) == number:
            break
    return pairs


def list_words(size: Size = SMALL) -> list[str]:
    """Every word of questions, answers and captions, in a fixed order."""
    fixed = [
        "what",
        "shape",
        "is",
        "the",
        "where",
        "how",
        "many",
        "are",
        "texture",
        "shade",
        "lines",
        "digit",
        ",",
    ]
    names = [*size.places, *SHAPES, *COLOUR_NAMES, *SHADE_NAMES, *TEXTURES, *LINES, *DIGITS]
    return list(dict.fromkeys([*fixed, *names]))


def write_split(
    folder: str | Path,
    split: str,
    num_images: int,
    questions_per_image: int = 12,
    *,
    seed: int = 0,
    workers: int | None = None,
    size: str | Size = SMALL,
) -> dict[str, Path]:
    """Draw a split as files in LLaVA's format.

    Written are folder/SPLIT/*.png, SPLIT.json and, for training, SPLIT_captions.json. A training
    conversation asks all questions about one image, turn by turn. In dev and test every question is
    an item of its own, with its `group` (kind) and `level`. Equal arguments give equal files, and
    no scene is in two splits.

    Args:
        folder: Where to write.
        split: One of `SPLITS`.
        num_images: How many images to draw.
        questions_per_image: How many questions to ask about each.
        seed: Seed of the scenes.
        workers: Processes that draw. Default: one for few images, else one per core.
        size: "small" or "large".

    Returns:
        The paths of "questions", "images" and, for training, "captions".

    Raises:
        UserError: The split or the size is unknown.
    """
    if split not in SPLITS:
        raise UserError(f"split {split!r} is not known; allowed are {', '.join(SPLITS)}")
    size = find_size(size)
    folder = Path(folder)
    if workers is None:
        workers = min(os.cpu_count() or 1, 1 + num_images // IMAGES_PER_WORKER)
    _check_ours(folder, split)
    (folder / split).mkdir(parents=True, exist_ok=True)
    paths = {"questions": folder / f"{split}.json", "images": folder}
    if not paths["questions"].exists():
        write_text_file(paths["questions"], "[]")  # says whose the images are, until all are drawn
    keys = [f"{split}/{seed}/{i}" for i in range(num_images)]
    write_one = partial(_write_image, folder, questions_per_image, size)
    with show_step(f"drawing {split} images", num_images) as step:
        records = list(step.count(_draw_all(write_one, keys, workers)))
    questions = [question for _, questions in records for question in questions]
    write_text_file(paths["questions"], json.dumps(questions))
    if split == "train":
        paths["captions"] = folder / f"{split}_captions.json"
        captions = json.dumps([caption for caption, _ in records])
        write_text_file(paths["captions"], captions)
    return paths


def _draw_all(write_one: Callable, keys: list[str], workers: int) -> Iterator[tuple]:
    """The records of every image, in order."""
    if workers == 1:
        yield from map(write_one, keys)
        return
    chunksize = max(1, min(IMAGES_AT_ONCE, len(keys) // (4 * workers)))
    pool = ProcessPoolExecutor(workers, get_context("spawn"), ignore_ctrl_c)
    try:
        yield from pool.map(write_one, keys, chunksize=chunksize)
    finally:
        pool.shutdown(cancel_futures=True)


def _check_ours(folder: Path, split: str) -> None:
    """Raise UserError where images or records of something else would be replaced."""
    file = folder / f"{split}.json"
    names = (split, f"{split}.json", f"{split}_captions.json")
    present = [name for name in names if (folder / name).exists()]
    if present and not _is_drawn(file, split):
        raise UserError(
            f"{folder} holds {' and '.join(present)} of something else than drawn shapes, which"
            " would be replaced; give another folder, or move it away"
        )


def _is_drawn(file: Path, split: str) -> bool:
    """Whether a file of records is of drawn images; one of images that are being drawn is empty."""
    try:
        records = json.loads(read_text_file(file))
        return records == [] or re.match(rf"{split}/-?\d+/\d+", records[0]["id"]) is not None
    except (UserError, ValueError, LookupError, TypeError):
        return False


def _write_image(folder: Path, number: int, size: Size, key: str) -> tuple[dict, list[dict]]:
    """Draw one image; returns the record of its caption and those of its questions."""
    split, _, name = key.split("/")
    scene = split_scene(key, size)
    rng = random.Random(f"{key}/questions")
    image = f"{split}/{name}.png"
    draw(scene).save(folder / image, compress_level=1)
    caption_record = _make_record(f"{key}/caption", image, [("", caption(scene, rng))])
    pairs = ask(scene, rng, number)
    if split == "train":
        return caption_record, [_make_record(key, image, pairs)]
    questions = []
    for i, pair in enumerate(pairs):
        kind = find_kind(pair[0])
        level, _ = KINDS[kind]
        record = _make_record(f"{key}/{i}", image, [pair])
        questions.append({**record, "group": kind, "level": level})
    return caption_record, questions


def _make_record(name: str, image: str, pairs: list[Pair]) -> dict:
    turns = []
    for i, (question, answer) in enumerate(pairs):
        value = f"<image>\n{question}" if i == 0 else question
        turns.append({"from": "human", "value": value.strip()})
        turns.append({"from": "gpt", "value": answer})
    return {"id": name, "image": image, "conversations": turns}


def find_kind(question: str) -> str:
    """The kind of a question, by its words."""
    words = question.split()
    return {"where": "place", "how": "count"}.get(words[0], words[1])


def split_scene(key: str, size: Size = SMALL) -> Scene:
    """The scene of a split's image.

    Every scene belongs to one split, by a hash of its content. A scene that belongs to another
    split is passed over for the next one.
    """
    split = key.split("/")[0]
    for attempt in range(1000):
        scene = make_scene(f"{key}/{attempt}", size)
        if _find_owner(scene) == split:
            return scene
    raise AssertionError("a thousand scenes belonged to other splits")


def _find_owner(scene: Scene) -> str:
    """The split of a scene: four tenths pretrain, four train, one dev, one test."""
    content = repr(scene.things).encode()
    tenth = int(hashlib.sha256(content).hexdigest(), 16) % 10
    owners = ("test", "dev", "pretrain", "pretrain", "pretrain", "pretrain")
    return owners[tenth] if tenth < len(owners) else "train"
