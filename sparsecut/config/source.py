"""A source of records, as a recipe names it in `data`."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from ..hub import looks_like_hub_name
from ..schema import UserError, check_choice, check_pattern, check_types

TEXT_ENDINGS = (".json", ".jsonl", ".ndjson", ".csv", ".tsv")
FILE_ENDINGS = (  # of files of records, in any case
    *(*TEXT_ENDINGS, *(f"{ending}.gz" for ending in TEXT_ENDINGS)),
    *(".parquet", ".arrow", ".tar"),
)
ON_ERROR = ("stop", "skip")
SIDES = ("train", "dev")
CHOICES = ("where", "hold_out", "keep", "dev")  # keys that choose among a source's records
# The keys of records that are read, in all their forms; `columns` gives them other names.
RECORD_KEYS = (
    "id",
    "image",
    "audio",
    "audios",
    "images",
    "conversations",
    "messages",
    "texts",
    "prompt",
    "completion",
    "question",
    "answer",
    "answers",
    "multiple_choice_answer",
    "questions",
    "choices",
    "options",
    "hint",
    "label",
    "query",
    "response",
    "instruction",
    "input",
    "output",
    "caption",
    "captions",
    "text",
    "system",
    "history",
    "group",
    "level",
)


@dataclass(frozen=True)
class Source:
    """Records, in any form that docs/data.md shows, and their images.

    Attributes:
        path: A file or a pattern of files (.json, .jsonl, .csv, .tsv, .parquet, .arrow, .tar), a
            folder (a saved dataset, images, a cloned dataset), or the name of a dataset of the hub.
        images: A folder or tar archive of the images. None stands for the folder of `path`, or for
            the file itself where it holds images.
        on_error: "stop" at a bad record, or "skip" it and count it.
        where: A regular expression that a record's id must contain.
        hold_out: A regular expression that a record's id must not contain.
        group: A regular expression whose parentheses match the group of a record in its id, where
            the record names none.
        keep: At most so many records, a fixed random choice.
        dev: About this fraction of the images is a dev part. It is cut by image: all records of an
            image are on one side.
        side: With `dev`, the side that is read, "train" or "dev".
        text_only: Whether records are read without their images, for a baseline.
        weight: The source's part in a mixture, relative to the others' weights.
        streaming: Whether records are read from the files while training goes on.
        max_broken: The fraction of records that may be skipped.
        anywhere: Whether images may lie outside the folder or archive that `images` names.
        max_mib: MiB that a record's text, or one of its images, may take.
        name: The configuration, of a dataset that has several.
        split: The split, of a dataset that has several, such as "train".
        revision: Of a dataset of the hub: a branch, a tag or a commit.
        question: What is asked about every image of class folders, or of a label or caption.
        columns: A key of records -> the name that these records have for it, as in
            `{question: frage, answer: antwort, image: bild}`.
    """

    path: str
    images: str | None = None
    on_error: str = "stop"
    where: str | None = None
    hold_out: str | None = None
    group: str | None = None
    keep: int | None = None
    dev: float | int | None = None
    side: str | None = None
    text_only: bool = False
    weight: float | int | None = None
    streaming: bool = False
    max_broken: float | int = 0.01
    anywhere: bool = False
    max_mib: int = 128
    name: str | None = None
    split: str | None = None
    revision: str | None = None
    question: str | None = None
    columns: dict[str, str] = field(default_factory=dict, hash=False)

    def __post_init__(self):
        check_types(self)
        check_choice("on_error", self.on_error, ON_ERROR)
        for name in ("where", "hold_out", "group"):
            check_pattern(name, getattr(self, name))
        if self.group and re.compile(self.group).groups != 1:
            raise UserError(
                f"group is {self.group!r}, but needs one pair of parentheses, around the group's"
                " name"
            )
        if self.keep is not None and self.keep < 1:
            raise UserError(
                f"keep is {self.keep}, but at least 1 record must be kept; remove it to keep all"
            )
        if self.weight is not None and self.weight <= 0:
            raise UserError(
                f"weight is {self.weight}, but must be above 0; remove the source to leave it out"
            )
        if not 0 <= self.max_broken <= 1:
            raise UserError(f"max_broken is {self.max_broken}, but a fraction lies between 0 and 1")
        if self.max_mib < 1:
            raise UserError(f"max_mib is {self.max_mib}, but a record takes at least 1 MiB of it")
        self._check_side()
        self._check_columns()
        self._check_stream()

    def _check_side(self) -> None:
        if (self.dev is None) != (self.side is None):
            raise UserError(
                f"dev is {self.dev} and side is {self.side}, but one has no effect without the"
                " other; give both, such as dev: 0.2 and side: train, or none"
            )
        if self.dev is None:
            return
        check_choice("side", self.side, SIDES)
        if not 0 < self.dev < 1:
            raise UserError(f"dev is {self.dev}, but a fraction of the images lies between 0 and 1")

    def _check_columns(self) -> None:
        for key in self.columns:
            check_choice("columns has a key that", key, RECORD_KEYS)
        names = list(self.columns.values())
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise UserError(
                f"columns gives {repeated[0]!r} to several keys, but a column has one meaning;"
                " remove one of them"
            )

    def _check_stream(self) -> None:
        if not self.streaming:
            return
        for name in CHOICES:
            if getattr(self, name) is not None:
                raise UserError(
                    f"{name} is set, but a stream takes all records; set streaming: false, or"
                    f" remove {name}"
                )


def looks_like_dataset_name(path: str) -> bool:
    """Whether a path has the form of a hub data set, owner/name, and not of a file of records."""
    if path.count("/") != 1 or path.lower().endswith(FILE_ENDINGS):
        return False
    return looks_like_hub_name(path)
