"""Questions about scenes at three levels, captions, and the files they are written to.

high: shape at a place, place of a shape. mid: texture, count of a colour. low: shade, line direction, digit.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

from ..schema import UserError
from .scenes import COLOURS, DIGITS, LINES, SHADES, SHAPES, TEXTURES, Scene, Thing, draw, make_scene
from .sizes import SMALL, Size, find_size

SPLITS = ("pretrain", "train", "dev", "test")
COLOUR, SHADE = tuple(COLOURS), tuple(SHADES)


def _of_thing(words: str, answer: Callable[[Thing], str]):
    def ask(scene: Scene, rng: random.Random) -> tuple[str, str]:
        thing = rng.choice(scene.things)
        return f"{words} {scene.places[thing.place]}", answer(thing)

    return ask


def _where(scene: Scene, rng: random.Random) -> tuple[str, str]:
    thing = rng.choice(scene.things)
    return f"where is the {SHAPES[thing.shape]}", scene.places[thing.place]


def _count(scene: Scene, rng: random.Random) -> tuple[str, str]:
    counts = [sum(t.colour == c for t in scene.things) for c in range(len(COLOUR))]
    number = rng.choice(sorted(set(counts)))
    colour = rng.choice([c for c, n in enumerate(counts) if n == number])
    return f"how many are {COLOUR[colour]}", DIGITS[number]


KINDS = {  # kind -> (level, question and answer of a scene)
    "shape": ("high", _of_thing("what shape is", lambda t: SHAPES[t.shape])),
    "place": ("high", _where),
    "texture": ("mid", _of_thing("what texture is", lambda t: TEXTURES[t.texture])),
    "count": ("mid", _count),
    "shade": ("low", _of_thing("what shade is", lambda t: SHADE[t.shade])),
    "lines": ("low", _of_thing("what lines are", lambda t: LINES[t.lines])),
    "digit": ("low", _of_thing("what digit is", lambda t: DIGITS[t.digit])),
}
LEVELS = ("high", "mid", "low")


def caption(scene: Scene, rng: random.Random, detail: float = 0.5) -> str:
    """What stands where; texture, shade, lines and digit are each told with probability
    `detail`.
    """

    def tell(thing: Thing) -> str:
        words = [SHADE[thing.shade], TEXTURES[thing.texture]]
        words = [w for w in words if rng.random() < detail] + [
            COLOUR[thing.colour],
            SHAPES[thing.shape],
        ]
        extra = [w for w in (LINES[thing.lines], DIGITS[thing.digit]) if rng.random() < detail]
        return f"{scene.places[thing.place]} {' '.join(words + extra)}"

    return " , ".join(tell(t) for t in scene.things)


def ask(scene: Scene, rng: random.Random, number: int) -> list[tuple[str, str]]:
    """`number` different questions with answers, kinds in turn, so that none is rare."""
    kinds, seen = list(KINDS), []
    order = [k for _ in range(number) for k in rng.sample(kinds, len(kinds))]
    for kind in order:
        pair = KINDS[kind][1](scene, rng)
        if pair not in seen:
            seen.append(pair)
        if len(seen) == number:
            break
    return seen


def vocabulary(size: Size = SMALL) -> list[str]:
    """Every word that questions, answers and captions are made of, in a fixed order."""
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
    words = [*fixed, *size.places, *SHAPES, *COLOUR, *SHADE, *TEXTURES, *LINES, *DIGITS]
    return list(dict.fromkeys(words))


FEW = 500  # pictures that one process has drawn before others have started


def write_split(
    folder: str | Path,
    split: str,
    num_pictures: int,
    questions_per_picture: int = 12,
    *,
    seed: int = 0,
    workers: int | None = None,
    size: str | Size = SMALL,
) -> dict[str, Path]:
    """Draw a split as files in LLaVA's format: folder/SPLIT/*.png, SPLIT.json and, for training,
    SPLIT_captions.json.

    Training conversations ask `questions_per_picture` questions about one picture, turn by turn; in
    dev and test every question is an item of its own, with its `group` (kind) and `level`. Equal
    arguments give equal files; scenes of different splits differ by construction of their seeds and
    because equal ones are passed over. workers: processes that draw; by default one for few
    pictures and, for many, one per core. size: "small" or "large". Returns name -> path.
    """
    if split not in SPLITS:
        raise UserError(
            f"split {split!r} is not one of the picture world's; allowed are {', '.join(SPLITS)}"
        )
    size, folder = find_size(size), Path(folder)
    if workers is None:
        workers = min(os.cpu_count() or 1, 1 + num_pictures // FEW)
    (folder / split).mkdir(parents=True, exist_ok=True)
    keys = [f"{split}/{seed}/{i}" for i in range(num_pictures)]
    work = partial(_write_picture, folder, questions_per_picture, size)
    if workers > 1:
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            records = list(pool.map(work, keys, chunksize=max(1, num_pictures // (4 * workers))))
    else:
        records = [work(key) for key in keys]
    paths = {"questions": folder / f"{split}.json", "images": folder}
    questions = [record for _, asked in records for record in asked]
    paths["questions"].write_text(json.dumps(questions))
    if split == "train":
        paths["captions"] = folder / f"{split}_captions.json"
        paths["captions"].write_text(json.dumps([told for told, _ in records]))
    return paths


def _write_picture(folder: Path, number: int, size: Size, key: str) -> tuple[dict, list[dict]]:
    split, name = key.split("/")[0], key.split("/")[-1]
    scene, rng = split_scene(key, size), random.Random(f"{key}/questions")
    image = f"{split}/{name}.png"
    draw(scene).save(folder / image, compress_level=1)
    told = _record(f"{key}/caption", image, [("", caption(scene, rng))])
    pairs = ask(scene, rng, number)
    if split == "train":
        return told, [_record(key, image, pairs)]
    return told, [
        {
            **_record(f"{key}/{i}", image, [pair]),
            "group": kind_of(pair[0]),
            "level": KINDS[kind_of(pair[0])][0],
        }
        for i, pair in enumerate(pairs)
    ]


def _record(name: str, image: str, pairs: list[tuple[str, str]]) -> dict:
    turns = []
    for i, (question, answer) in enumerate(pairs):
        value = ("<image>\n" if i == 0 else "") + question
        turns += [{"from": "human", "value": value.strip()}, {"from": "gpt", "value": answer}]
    return {"id": name, "image": image, "conversations": turns}


def kind_of(question: str) -> str:
    """The kind a question is of, from its words."""
    words = question.split()
    return {"where": "place", "how": "count"}.get(words[0], words[1])


def split_scene(key: str, size: Size = SMALL) -> Scene:
    """The scene of a split's picture; where its content belongs to another split, the next one that
    is its own.

    Content is shared out by a digest of the scene, so no two splits can ever hold equal scenes.
    """
    split, *rest = key.split("/")
    for attempt in range(1000):
        scene = make_scene("/".join([split, *rest, str(attempt)]), size)
        if _owner(scene) == split:
            return scene
    raise AssertionError("a thousand scenes belonged to other splits")


def _owner(scene: Scene) -> str:
    share = int(hashlib.sha256(repr(scene.things).encode()).hexdigest(), 16) % 10
    return (
        ("test", "dev", "pretrain", "pretrain", "pretrain", "pretrain")[share]
        if share < 6
        else "train"
    )
