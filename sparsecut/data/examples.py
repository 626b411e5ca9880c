"""Examples: records of every form, read from files and checked as far as text goes.

`record_forms` has the forms. `id`, `group` and `level` are optional in all of them; `group` and
`level` are kept for scoring.
"""

from __future__ import annotations

import hashlib
import io
import logging
import re
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from PIL import Image

from ..audio import Clip, decode_audio
from ..config.recipe import Source
from ..config.yaml_io import expand_path
from ..pixels import read_size
from ..schema import UserError
from ..waits import show_step
from .access import DEFAULT_ACCESS, Access, get_access
from .audio_records import explain_audio, find_medium, put_for_images
from .errors import RecordError, show_value
from .form_choice import Columns, choose_form, get_columns
from .images import ImageStore, decode_image
from .kept_records import KEPT, describe_reading
from .locating import find_record_files
from .record_files import RecordFile
from .record_forms import convert_record
from .sides import drop_images, take_side
from .texts import check_text
from .turns import IMAGE as IMAGE

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Example:
    """One conversation.

    Attributes:
        id: The record's id.
        images: Names of the images (or sound files) in `store`, or their encoded bytes.
        messages: {"role", "content"} of every turn, with `<image>` in user contents, for audio too.
        group: A category; scores are given for each.
        level: A level of difficulty; scores are given for each.
        source: Where the record stands, such as "train.jsonl line 7".
        store: Opens the images that have names.
        skip: Whether the record is left out, in place of an error, where an image is broken.
        medium: What `images` are, "image" or "audio".
    """

    id: str
    images: list[str | bytes]
    messages: list[dict[str, str]]
    group: str | None = None
    level: str | None = None
    source: str = ""
    store: ImageStore | None = field(default=None, repr=False, compare=False)
    skip: bool = field(default=False, repr=False, compare=False)
    medium: str = "image"

    @property
    def place(self) -> str:
        """Where the record stands, or its id where that is not known."""
        return self.source or self.id

    def get_messages(self, image_token: str) -> list[dict[str, str]]:
        """Return the messages with a processor's placeholder in place of `<image>`."""
        messages = []
        for message in self.messages:
            content = message["content"].replace(IMAGE, image_token)
            messages.append({**message, "content": content})
        return messages

    def load_images(self, processor=None) -> list[Image.Image | Clip]:
        """Return the images in RGB, or the clips, in order.

        Args:
            processor: The model's; clips that are longer than it takes are refused then.

        Raises:
            RecordError: One is missing, broken, or too long.
        """
        return [self.load_image(number, processor) for number in range(len(self.images))]

    def load_image(self, number: int, processor=None) -> Image.Image | Clip:
        """Return one of the images, or clips, by its place among them; see `load_images`."""
        image = self.images[number]
        try:
            if self.medium == "audio":
                return self._load_clip(image, processor)
            return decode_image(image) if isinstance(image, bytes) else self.store.load(image)
        except UserError as error:
            raise RecordError(self.place, str(error)) from None

    def read_sizes(self) -> list[tuple[int, int]]:
        """Return height and width of the upright images; RecordError as for `load_images`."""
        sizes = []
        for image in self.images:
            what = "the image stored in the record" if isinstance(image, bytes) else image
            try:
                data = image if isinstance(image, bytes) else self.store.read_bytes(image)
                width, height = read_size(io.BytesIO(data), what, upright=True)
            except (UserError, OSError) as error:
                raise RecordError(self.place, str(error)) from None
            sizes.append((height, width))
        return sizes

    def _load_clip(self, name: str | bytes, processor) -> Clip:
        if isinstance(name, bytes):
            clip = decode_audio(name, "the audio stored in the record")
        else:
            what = f"the audio {name} in {self.store.path}"
            try:
                clip = decode_audio(self.store.read_bytes(name), what)
            except OSError as error:
                raise UserError(f"{what} cannot be read: {error}") from None
        if processor is not None:
            processor.check_length(clip)
        return clip

    def check_images(self) -> None:
        """Raise RecordError unless every image is there and may be read; none is opened."""
        try:
            for name in self.images:
                if isinstance(name, str):
                    self.store.check(name)
        except UserError as error:
            raise RecordError(self.place, str(error)) from None


def read_source(source: Source, problems: list[RecordError]) -> list[Example]:
    """Return the examples of a recipe's source.

    Args:
        source: The files, and which of their records are chosen.
        problems: With on_error "skip", the errors of bad records are appended.

    Raises:
        RecordError: A record is bad, and the source says on_error "stop".
        UserError: A file is missing or broken, or no record is left.
    """
    examples = read_all(source, problems)
    _warn_of_ids(source, examples)
    selected = select_examples(
        examples, where=source.where, hold_out=source.hold_out, keep=source.keep
    )
    if not examples:
        last = f"; {len(problems)} were skipped, the last: {problems[-1]}" if problems else ""
        raise UserError(f"{source.path} holds no good record{last}")
    if not selected:
        raise UserError(
            f"{source.path} gives no record to use: of {len(examples)} good ones, none is left by"
            f" where={source.where!r} and hold_out={source.hold_out!r}; ids look like"
            f" {show_value([example.id for example in examples[:3]])}"
        )
    if source.dev is not None:
        selected = take_side(selected, source.dev, source.side, source.path)
    if source.text_only:
        selected = [drop_images(example) for example in selected]
    if source.group:
        selected = [_add_group(example, source.group) for example in selected]
    return selected


def read_all(source: Source, problems: list[RecordError]) -> list[Example]:
    """Return all examples of a source's files, before any are chosen; see `read_source`.

    Inside of `keep_records`, unchanged files are read once.
    """
    files = find_record_files(source)
    key = describe_reading(source, files)
    if key is not None and key in KEPT:
        return list(KEPT[key])
    images = expand_path(source.images) if source.images else None
    examples = read_examples(
        files,
        images,
        problems=problems if source.on_error == "skip" else None,
        access=get_access(source),
        columns=get_columns(source),
    )
    if key is not None:
        KEPT[key] = list(examples)
    return examples


def _warn_of_ids(source: Source, examples: list[Example]) -> None:
    """Tell where ids do not do what choosing by ids is for."""
    counts = Counter(example.id for example in examples)
    repeated = [name for name, count in counts.items() if count > 1]
    if repeated:
        logger.warning(
            "%s: %d ids are of several records, such as %s; `where`, `hold_out` and `keep` cannot"
            " tell these apart",
            source.path,
            len(repeated),
            show_value(repeated[0]),
        )
    if source.hold_out and not any(re.search(source.hold_out, name) for name in counts):
        logger.warning(
            "%s: hold_out=%r matches none of %d ids, so nothing is held out; ids look like %s",
            source.path,
            source.hold_out,
            len(counts),
            show_value(list(counts)[:3]),
        )


def _add_group(example: Example, pattern: str) -> Example:
    """The example with the group that the pattern's parentheses match in its id."""
    match = re.search(pattern, example.id)
    if example.group or match is None:
        return example
    return replace(example, group=match[1])


def read_examples(
    path: str | Path | list[RecordFile],
    images: str | Path | None = None,
    *,
    problems: list[RecordError] | None = None,
    access: Access = DEFAULT_ACCESS,
    columns: Columns | None = None,
) -> list[Example]:
    """Return all records of a file, or of all files that a pattern names, as examples.

    Args:
        path: A file, a pattern, a folder, or the files of a source.
        images: A folder or tar archive of the images. None stands for the file's own folder or,
            where it holds its images itself, the file.
        problems: Errors of bad records are appended. Without it the first one is raised.
        access: What records may reach.
        columns: Other names of the records' keys.

    Raises:
        RecordError: A record is bad.
        UserError: A file is missing or broken, or no record has one of the columns.
    """
    examples = []
    shared_store = None if images is None else ImageStore(images, access)
    files = path if isinstance(path, list) else find_record_files(Source(str(path)))
    for file in files:
        store = shared_store or file.open_images(access)
        with show_step(f"reading records of {file.path}") as step:
            for place, record in step.count(file.read(access, images_by_name=images is None)):
                example = _parse_checked(record, place, store, problems, columns)
                if example is not None:
                    examples.append(example)
    if columns is not None:
        columns.check_seen(f"the records of {files[0].path}")
    return examples


def _parse_checked(
    record: Any,
    place: str,
    store: ImageStore,
    problems: list[RecordError] | None,
    columns: Columns | None,
) -> Example | None:
    """The example of a record, its images there; None for a bad one, which `problems` then has."""
    try:
        example = parse_record(record, place, store, skip=problems is not None, columns=columns)
        example.check_images()
    except RecordError as error:
        if problems is None:
            raise
        problems.append(error)
        return None
    return example


def select_examples(
    examples: list[Example],
    *,
    where: str | None = None,
    hold_out: str | None = None,
    keep: int | None = None,
) -> list[Example]:
    """Return some of the examples, in file order.

    `keep` chooses by a hash of the ids. So the choice is random, but the same for every seed and
    machine. A smaller choice lies inside a larger one.

    Args:
        examples: The examples to choose among.
        where: A regular expression that an id must contain.
        hold_out: A regular expression that an id must not contain.
        keep: At most so many.
    """
    selected = [example for example in examples if _matches(example, where, hold_out)]
    if keep is None or keep >= len(selected):
        return selected
    digests = [hashlib.sha1(example.id.encode()).digest() for example in selected]
    order = sorted(range(len(selected)), key=lambda i: (digests[i], i))
    return [selected[i] for i in sorted(order[:keep])]


def _matches(example: Example, where: str | None, hold_out: str | None) -> bool:
    if where and not re.search(where, example.id):
        return False
    return not (hold_out and re.search(hold_out, example.id))


def parse_record(
    record: Any,
    place: str,
    store: ImageStore,
    *,
    skip: bool = False,
    columns: Columns | None = None,
) -> Example:
    """Check a record and return it as an example.

    Args:
        record: The record, or a function that reads it.
        place: Where it stands.
        store: Opens its images.
        skip: Whether it may be left out later, where an image is broken.
        columns: Other names of its keys.

    Raises:
        RecordError: The record cannot be read, is of no known form, or is wrong.
    """
    try:
        record = record() if callable(record) else record
        if columns is not None and isinstance(record, dict):
            record = columns.rename(record)
        medium = find_medium(record)
        with explain_audio(medium):
            record = put_for_images(record, medium)
            form = choose_form(record, columns)
            messages, images = convert_record(record, form, store.access.max_bytes)
        record_id, group, level = (_get_text(record, key) for key in ("id", "group", "level"))
    except UserError as error:
        raise RecordError(place, str(error)) from None
    return Example(
        id=place if record_id is None else record_id,
        images=images,
        messages=messages,
        group=group,
        level=level,
        source=place,
        store=store,
        skip=skip,
        medium=medium,
    )


def _get_text(record: dict, key: str) -> str | None:
    value = record.get(key)
    if isinstance(value, list | dict):
        raise UserError(f"`{key}` holds {show_value(value)}, but a text or a number is needed")
    if isinstance(value, str):
        check_text(value, f"`{key}`")
    return None if value is None else str(value)
