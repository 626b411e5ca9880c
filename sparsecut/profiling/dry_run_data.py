"""How many records a stage learns from, and how long they are.

The model's tokenizer counts where it is on this machine; else lengths are estimated from words.
Where data is absent, published numbers or assumptions stand in, and a note says so.
"""

from __future__ import annotations

import glob
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from ..config.recipe import Source, Stage
from ..config.yaml_io import expand_path
from ..data.encoding import ExampleEncoder
from ..data.examples import Example, read_source
from ..data.locating import is_dataset_name
from ..data.streaming import read_stream
from ..data.unknown_records import UnknownCount
from ..schema import UserError
from .local_processor import count_text_tokens, get_step

TOKENS_PER_WORD = 1.5
ASSUMED_TOKENS = 64  # text tokens of a record, where no data is there
SAMPLE_SIZE = 1000  # records of a stream that are read
# Numbers of records of LLaVA-1.5's files.
PUBLISHED = {
    "blip_laion_cc_sbu_558k.json": 558_128,
    "llava_v1_5_mix665k.json": 665_298,
}


class RecordSize(NamedTuple):
    """How large a record is.

    Attributes:
        text_tokens: Its text tokens, estimated.
        images: Its images.
    """

    text_tokens: int
    images: int


class RowSize(NamedTuple):
    """How large a row of a batch is.

    Attributes:
        tokens: Its tokens, image tokens included.
        images: Its images.
    """

    tokens: int
    images: int


@dataclass
class RecordFacts:
    """What is known of a stage's records.

    Attributes:
        number: How many there are, None where nothing says it.
        origin: Where the number comes from, for people.
        text_tokens: Mean text tokens of a record.
        longest_text: Text tokens of the longest record, None where no record was read.
        image_fraction: Fraction of the records that have images.
        images: Mean images of such a record, rounded.
        max_images: Most images of a record, None where no record was read.
        notes: What was assumed.
    """

    number: int | None
    origin: str
    text_tokens: float = ASSUMED_TOKENS
    longest_text: int | None = None
    image_fraction: float = 1.0
    images: int = 1
    max_images: int | None = None
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class RowFacts:
    """What a row of a batch holds: one record, or the records that are packed into it.

    Attributes:
        records: Mean records of a row.
        tokens: Mean tokens of a row.
        image_tokens: Mean image tokens of a row.
        kinds: Fraction and size of the rows with images, and of those without.
        longest: Size of the largest row.
    """

    records: float
    tokens: float
    image_tokens: float
    kinds: tuple[tuple[float, RowSize], ...]
    longest: RowSize


def read_record_facts(stage: Stage, encoder: ExampleEncoder | None = None) -> RecordFacts:
    """Find out what a stage learns from.

    Records are read where they are. For well-known files that are absent, published numbers are
    taken. Sources count by their weights.

    Args:
        stage: The stage.
        encoder: Of the model's processor, where that is on this machine.

    Raises:
        UserError: If a file is there but cannot be read, if a source's choice leaves no record, or
            if records teach words that the tokenizer does not know.
    """
    notes: list[str] = []
    counts = []
    origins = []
    samples = []  # weight, and sizes of the records
    all_counted = True
    unknown = UnknownCount()
    for source in stage.data:
        examples = _read_examples(source, notes)
        count, origin = _count_records(source, examples)
        counts.append(count)
        origins.append(origin)
        if examples:
            sizes, is_counted = _find_sizes(examples, encoder, unknown)
            all_counted = all_counted and is_counted
            samples.append((source.weight or len(examples), sizes))
    facts = RecordFacts(
        number=None if None in counts else sum(counts),
        origin=", ".join(dict.fromkeys(origins)),
        notes=notes,
    )
    if unknown.records:
        notes += unknown.check(stage.name, encoder.processor.tokenizer)
    if samples:
        _add_sizes(facts, samples)
        if len(samples) < len(stage.data):
            notes.append("records that are absent are assumed to be like those that were read")
        num_read = sum(len(sizes) for _, sizes in samples)
        notes.append(_describe_length(facts.text_tokens, num_read, all_counted))
    else:
        notes.append(
            f"no record was read: {ASSUMED_TOKENS} text tokens and one image a record are assumed"
        )
    return facts


def _describe_length(text_tokens: float, num_read: int, all_counted: bool) -> str:
    """How long records are, and how that was found."""
    way = (
        "counted with the model's own tokenizer"
        if all_counted
        else f"the tokenizer is not on this machine, so every word counts as {TOKENS_PER_WORD}"
    )
    return (
        f"a record has {text_tokens:.1f} text tokens in the mean, over {num_read:,} records ({way})"
    )


def _find_sizes(
    examples: list[Example], encoder: ExampleEncoder | None, unknown: UnknownCount
) -> tuple[list[RecordSize], bool]:
    """Sizes of records, and whether their tokens were counted; of very many, some are."""
    sizes = [_estimate_size(example) for example in examples]
    counts = None if encoder is None else count_text_tokens(encoder, examples, unknown)
    if counts is None:
        return sizes, False
    step = get_step(len(examples))
    if step == 1:
        pairs = zip(counts, sizes, strict=True)
        return [RecordSize(tokens, size.images) for tokens, size in pairs], True
    factor = sum(counts) / max(1, sum(size.text_tokens for size in sizes[::step]))
    return [RecordSize(round(factor * size.text_tokens), size.images) for size in sizes], True


def _count_records(source: Source, examples: list[Example] | None) -> tuple[int | None, str]:
    """How many records a source gives, and where the number comes from."""
    name = Path(source.path).name
    if source.streaming:
        return None, "a stream"
    if examples is not None:
        return len(examples), "read"
    if name in PUBLISHED and not (source.where or source.hold_out):
        published = PUBLISHED[name]
        return min(published, source.keep or published), f"as published, {name} is absent"
    return None, "absent"


def _add_sizes(facts: RecordFacts, samples: Sequence[tuple[float, list[RecordSize]]]) -> None:
    """Fill in the sizes of records, with every source by its weight."""
    total = sum(weight for weight, _ in samples)
    text_tokens = 0
    image_fraction = 0
    all_texts = []
    all_images = []
    for weight, sizes in samples:
        texts = [size.text_tokens for size in sizes]
        images = [size.images for size in sizes]
        fraction = weight / total
        text_tokens += fraction * sum(texts) / len(sizes)
        image_fraction += fraction * sum(number > 0 for number in images) / len(sizes)
        all_texts += texts
        all_images += images
    facts.text_tokens = text_tokens
    facts.image_fraction = image_fraction
    facts.longest_text = max(all_texts)
    facts.max_images = max(all_images)
    with_images = [number for number in all_images if number]
    facts.images = round(sum(with_images) / len(with_images)) if with_images else 0


def describe_row(stage: Stage, facts: RecordFacts, num_image_tokens: int) -> RowFacts:
    """Describe a row of the stage's batches.

    Lengths are cut to the stage's `max_length`. Where no record was read, the longest one is
    assumed to reach it.

    Args:
        stage: The stage.
        facts: What is known of its records; a note is added where training would refuse some.
        num_image_tokens: Image tokens of an image.
    """
    limit = stage.max_length or math.inf
    max_images = _limit_images(stage, facts, num_image_tokens)
    image_tokens = facts.images * num_image_tokens
    text_length = min(round(facts.text_tokens), limit)
    image_length = min(round(facts.text_tokens) + image_tokens, limit)
    mean_length = facts.image_fraction * image_length + (1 - facts.image_fraction) * text_length
    mean_image_tokens = facts.image_fraction * facts.images * num_image_tokens
    if stage.pack:
        records, kinds = _pack(stage, facts, image_length, image_tokens, max(text_length, 1))
        has_images = kinds[0][0] > 0
        return RowFacts(
            records=records,
            tokens=mean_length * records,
            image_tokens=mean_image_tokens * records,
            kinds=kinds,
            longest=RowSize(stage.pack, kinds[0][1].images if has_images else 0),
        )
    if facts.longest_text is None:
        longest = stage.max_length or image_length
    else:
        longest = min(facts.longest_text + max_images * num_image_tokens, limit)
    pad_to = stage.pad_to or 1
    kinds = (
        (facts.image_fraction, RowSize(image_length, facts.images)),
        (1 - facts.image_fraction, RowSize(text_length, 0)),
    )
    return RowFacts(
        records=1.0,
        tokens=mean_length,
        image_tokens=mean_image_tokens,
        kinds=kinds,
        longest=RowSize(math.ceil(longest / pad_to) * pad_to, max_images),
    )


def _limit_images(stage: Stage, facts: RecordFacts, num_image_tokens: int) -> int:
    """Most images of a record that training takes."""
    max_images = facts.images if facts.max_images is None else facts.max_images
    image_tokens = max_images * num_image_tokens
    if stage.max_image_tokens is None or image_tokens <= stage.max_image_tokens:
        return max_images
    facts.notes.append(
        f"a record has {image_tokens:,} image tokens, but"
        f" max_image_tokens={stage.max_image_tokens}: training refuses it, or skips it where its"
        " source has on_error: skip"
    )
    return stage.max_image_tokens // num_image_tokens


def _pack(
    stage: Stage, facts: RecordFacts, image_length: int, image_tokens: int, text_length: int
) -> tuple[float, tuple[tuple[float, RowSize], ...]]:
    """Describe full rows: of records with images, as many as both limits allow, or of texts alone.

    Args:
        stage: The stage.
        facts: What is known of its records; a note is added.
        image_length: Tokens of a record with images.
        image_tokens: Image tokens of it.
        text_length: Tokens of a record without images.

    Returns:
        Mean records of a row, and `RowFacts.kinds`.
    """
    per_image_row = max(1.0, stage.pack / max(image_length, 1))
    per_text_row = max(1.0, stage.pack / text_length)
    if image_tokens and stage.max_image_tokens is not None:
        per_image_row = max(1.0, min(per_image_row, stage.max_image_tokens / image_tokens))
    # Rows of each kind for one record.
    image_rows = facts.image_fraction / per_image_row
    text_rows = (1 - facts.image_fraction) / per_text_row
    records = 1 / (image_rows + text_rows)
    facts.notes.append(
        f"rows of {stage.pack:,} tokens hold {records:.1f} records in the mean, if they are full"
    )
    image_row = RowSize(
        min(stage.pack, round(per_image_row * image_length)), round(per_image_row * facts.images)
    )
    text_row = RowSize(stage.pack, 0)
    return records, ((image_rows * records, image_row), (text_rows * records, text_row))


def _estimate_size(example: Example) -> RecordSize:
    num_words = sum(len(message["content"].split()) for message in example.messages)
    return RecordSize(round(TOKENS_PER_WORD * num_words), len(example.images))


def _read_examples(source: Source, notes: list[str]) -> list[Example] | None:
    """Examples of a source as training would take them, of a stream the first ones.

    None where its files are absent; a note then says so.
    """
    try:
        path = expand_path(source.path)
    except UserError as error:  # an environment variable that is not set
        notes.append(f"no records of {source.path}: {error}")
        return None
    exists = Path(path).exists() or glob.glob(path, recursive=True)
    if is_dataset_name(path):
        notes.append(f"no records of {source.path}: a data set of the hub is not fetched for this")
        return None
    if not exists and "{" not in path:
        notes.append(f"no records of {source.path}: there is no such file")
        return None
    if not source.streaming:
        return read_source(source, [])
    records = read_stream(source)
    examples = (record for record in records if isinstance(record, Example))
    return list(itertools.islice(examples, SAMPLE_SIZE))
