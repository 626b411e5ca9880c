"""How many records a stage learns from and how long they are, as far as it can be known without the
model's own tokenizer.
"""

from __future__ import annotations

import glob
import itertools
import math
from dataclasses import dataclass, field
from pathlib import Path

from ..config.recipe import Source, Stage
from ..config.yaml_io import expand_path
from ..data.examples import Example, read_source
from ..data.readers import find_files
from ..data.streaming import read_stream

PER_WORD = 1.5  # tokens of a word, by and large
ASSUMED = 64  # text tokens of a record, where no data says otherwise
SAMPLE = 1000  # records of a stream that are looked at
PUBLISHED = {
    "blip_laion_cc_sbu_558k.json": 558_128,
    "llava_v1_5_mix665k.json": 665_298,
}  # records of LLaVA-1.5's files


@dataclass
class Records:
    """A stage's records: their number (None where nothing says it) and what is said of it; text
    tokens in the mean and of the longest.

    pictured: share of records with pictures; pictures: of such a record, in the mean; most: of any
    record. longest and most are None where no record was seen.
    """

    number: int | None
    said: str
    text: float = ASSUMED
    longest: int | None = None
    pictured: float = 1.0
    pictures: int = 1
    most: int | None = None
    notes: list[str] = field(default_factory=list)


def records_of(stage: Stage) -> Records:
    """What is known of a stage's records: read where they are, published numbers where they are
    not.

    Sources count by their weights. Raises ValueError for a file that is there and cannot be read,
    or a choice that leaves nothing.
    """
    number, said, notes, seen = 0, [], [], []
    for source in stage.data:
        examples = _examples(source, notes)
        if examples is not None and examples:
            seen.append((source.weight or len(examples), [_size(example) for example in examples]))
        if source.streaming:
            number, known = None, "a stream"
        elif examples is not None:
            number, known = number if number is None else number + len(examples), "read"
        elif (name := Path(source.path).name) in PUBLISHED and not (
            source.where or source.hold_out
        ):
            some = min(PUBLISHED[name], source.keep or PUBLISHED[name])
            number, known = (
                (number if number is None else number + some),
                f"as published, {name} is not here",
            )
        else:
            number, known = None, "absent"
        said.append(known)
    found = Records(number, ", ".join(dict.fromkeys(said)), notes=notes)
    if not seen:
        notes.append(
            f"no record is here: {ASSUMED} text tokens and one picture a record are assumed"
        )
        return found
    total = sum(weight for weight, _ in seen)
    shares = [(weight / total, sizes) for weight, sizes in seen]
    found.text = sum(share * sum(text for text, _ in sizes) / len(sizes) for share, sizes in shares)
    found.pictured = sum(
        share * sum(num > 0 for _, num in sizes) / len(sizes) for share, sizes in shares
    )
    every = [size for _, sizes in seen for size in sizes]
    with_some = [num for _, num in every if num]
    found.pictures = round(sum(with_some) / len(with_some)) if with_some else 0
    if len(seen) < len(stage.data):
        notes.append("records that are not here are taken to be like those that are")
    found.longest, found.most = max(text for text, _ in every), max(num for _, num in every)
    notes.append(
        f"{found.text:.0f} text tokens a record in the mean: {PER_WORD} for a word of"
        f" {len(every):,} records"
    )
    return found


@dataclass(frozen=True)
class Item:
    """What stands in one row of a batch: a record, or the records that are packed into it.

    kinds: (share of the items, (tokens, pictures)) with pictures and without; longest: (tokens,
    pictures) of the largest one.
    """

    records: float
    tokens: float
    image_tokens: float
    kinds: tuple[tuple[float, tuple[int, int]], ...]
    longest: tuple[int, int]


def item_of(stage: Stage, found: Records, image_tokens: int) -> Item:
    """What a row of the stage's batches holds.

    Lengths are cut to the stage's max_length; of records that nobody has seen, the longest is taken
    to reach it.
    """
    limit, most = stage.max_length or math.inf, found.pictures if found.most is None else found.most
    if stage.max_image_tokens is not None and most * image_tokens > stage.max_image_tokens:
        found.notes.append(
            f"a record has {most * image_tokens:,} image tokens, but"
            f" max_image_tokens={stage.max_image_tokens}: training refuses it, or skips it where"
            " its source says on_error: skip"
        )
        most = stage.max_image_tokens // image_tokens
    text, pictures = min(round(found.text), limit), found.pictures
    whole = min(round(found.text) + pictures * image_tokens, limit)
    mean, pictured = (
        found.pictured * whole + (1 - found.pictured) * text,
        found.pictured * pictures * image_tokens,
    )
    if stage.pack:
        return _packed(stage, found, (whole, pictures * image_tokens), max(text, 1), mean, pictured)
    longest = (
        (stage.max_length or whole)
        if found.longest is None
        else min(found.longest + most * image_tokens, limit)
    )
    longest = math.ceil(longest / (stage.pad_to or 1)) * (stage.pad_to or 1)
    kinds = (found.pictured, (whole, pictures)), (1 - found.pictured, (text, 0))
    return Item(1.0, mean, pictured, kinds, (longest, most))


def _packed(
    stage: Stage, found: Records, shown: tuple[int, int], text: int, mean: float, pictured: float
) -> Item:
    """A full row: of records with pictures (shown: tokens and image tokens of one), as many as both
    limits allow, or of texts alone.
    """
    tokens, images = shown
    with_some, without = max(1.0, stage.pack / max(tokens, 1)), max(1.0, stage.pack / text)
    if images and stage.max_image_tokens is not None:
        with_some = max(1.0, min(with_some, stage.max_image_tokens / images))
    rows = found.pictured / with_some, (1 - found.pictured) / without  # of a record
    many = 1 / sum(rows)
    found.notes.append(
        f"rows of {stage.pack:,} tokens hold {many:.1f} records in the mean, if they are full"
    )
    size = min(stage.pack, round(with_some * tokens)), round(with_some * found.pictures)
    kinds = (rows[0] * many, size), (rows[1] * many, (stage.pack, 0))
    return Item(many, mean * many, pictured * many, kinds, (stage.pack, size[1] if rows[0] else 0))


def _size(example: Example) -> tuple[int, int]:
    words = sum(len(message["content"].split()) for message in example.messages)
    return round(PER_WORD * words), len(example.images)


def _examples(source: Source, notes: list[str]) -> list[Example] | None:
    """The records of a source as training would take them, of a stream the first; None where its
    files are not here.
    """
    try:
        path = expand_path(source.path)
    except ValueError as error:  # an environment variable that is not set
        notes.append(f"no records of {source.path}: {error}")
        return None
    if not Path(path).exists() and not glob.glob(path, recursive=True) and "{" not in path:
        notes.append(f"no records of {source.path}: there is no such file")
        return None
    if source.streaming:
        first = (one for one in read_stream(source, find_files(path)) if isinstance(one, Example))
        return list(itertools.islice(first, SAMPLE))
    return read_source(source, [])
