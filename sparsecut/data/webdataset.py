"""WebDataset archives: samples of KEY.json or KEY.txt, with images or audio named by the key."""

from __future__ import annotations

import posixpath
import re
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from ..schema import UserError
from .access import Access, check_excess
from .archives import check_member, iterate_members, refuse_damaged, show_name
from .json_text import parse_json

# Members that are images or audio, in any case; other members are passed over.
IMAGE_SUFFIXES = (
    ".jpg",
    ".jpeg",
    ".jpe",
    ".jfif",
    ".png",
    ".webp",
    ".bmp",
    ".gif",
    ".tif",
    ".tiff",
)
AUDIO_SUFFIXES = (".wav", ".flac", ".mp3", ".ogg")
MEDIA_SUFFIXES = IMAGE_SUFFIXES + AUDIO_SUFFIXES
MAX_MEMBERS = 10_000  # of one sample
NUMBER = re.compile(r"[0-9]+")


@dataclass
class _Sample:
    """Members that follow one another and have the same key.

    Attributes:
        key: What their names begin with.
        contents: Name -> its bytes, None for an image or audio that is read later.
        others: Names of members that are passed over.
        problem: Why the sample cannot be used.
        num_bytes: Bytes of the contents.
    """

    key: str
    contents: dict[str, bytes | None] = field(default_factory=dict)
    others: list[str] = field(default_factory=list)
    problem: UserError | None = None
    num_bytes: int = 0

    def add(self, archive: tarfile.TarFile, member: tarfile.TarInfo, by_name: bool, access: Access):
        """Add a member, and read it unless it is an image or audio that is read by its name."""
        if self.problem is not None:
            return
        if not (is_json(member.name) or is_caption(member.name) or is_medium(member.name)):
            self.others.append(member.name)
            return
        try:
            self._check(member, access)
            is_read = not is_medium(member.name) or not by_name
            if is_read:
                self.num_bytes += member.size
                what = "the sample with its images or audio"
                check_excess(what, self.num_bytes, access.max_bytes)
            self.contents[member.name] = archive.extractfile(member).read() if is_read else None
        except UserError as error:
            self.problem = error
            self.contents = {}

    def _check(self, member: tarfile.TarInfo, access: Access) -> None:
        name = show_name(member.name)
        if not member.isreg():
            raise UserError(
                f"{name} is a link or a special file; pack the archive again with --dereference and"
                " --hard-dereference"
            )
        if member.name in self.contents:
            raise UserError(f"{name} stands in the archive twice; remove one")
        if len(self.contents) >= MAX_MEMBERS:
            raise UserError(f"the sample has more than {MAX_MEMBERS:,} files; divide it")
        check_member(member, access.max_bytes)

    def parse(self) -> dict:
        """Return the record; UserError where there is none."""
        if self.problem is not None:
            raise self.problem
        texts = [content for name, content in self.contents.items() if is_json(name)]
        captions = [content for name, content in self.contents.items() if is_caption(name)]
        if len(texts or captions) != 1:
            names = ", ".join(map(show_name, [*self.contents, *self.others][:5]))
            raise UserError(
                f"the sample has {len(texts)} .json files among {names}, but needs one, or one .txt"
                " that holds the image's caption"
            )
        record = _parse_record(texts[0]) if texts else {}
        if len(captions) == 1 and record.get("caption") is None:
            record = {**record, "caption": _decode(captions[0], ".txt")}
        named = {"id": show_name(self.key), **record}
        # Names in the text would name the same images again.
        if images := self._list_media(IMAGE_SUFFIXES):
            return {**named, "image": images, "images": None}
        if audio := self._list_media(AUDIO_SUFFIXES):  # beside images it is passed over
            return {**named, "audio": audio, "audios": None}
        return named

    def _list_media(self, suffixes: tuple[str, ...]) -> list[str | bytes]:
        """The bytes of members with these suffixes, or their names where they are read later."""
        media = []
        names = [name for name in self.contents if name.lower().endswith(suffixes)]
        for name in sort_media(self.key, names):
            content = self.contents[name]
            media.append(show_name(name) if content is None else content)
        return media


def read_samples(path: Path, by_name: bool, access: Access) -> Iterator[tuple[str, partial]]:
    """Yield where each sample stands, and a function that returns its record.

    Args:
        path: The archive.
        by_name: Images and audio come as names for an `ImageStore` of the archive, not as bytes.
        access: What records may reach.

    Raises:
        UserError: The archive is damaged.
    """
    with refuse_damaged(path):
        sample = None
        for archive, member in iterate_members(path):
            key = get_key(member.name)
            if member.isdir() or key is None:
                continue
            if sample is not None and key != sample.key:
                yield _place_sample(path, sample)
                sample = None
            sample = sample or _Sample(key)
            sample.add(archive, member, by_name, access)
        if sample is not None:
            yield _place_sample(path, sample)


def _place_sample(path: Path, sample: _Sample) -> tuple[str, partial]:
    return f"{path} sample {show_name(sample.key)}", partial(sample.parse)


def get_key(name: str) -> str | None:
    """Return the key of a member: its folder, and its file's name up to the first dot.

    None for files that no one packed on purpose, such as ._a.png, .DS_Store and all in __MACOSX.
    """
    folder, _, file = posixpath.normpath(name).lstrip("/").rpartition("/")
    stem = file.partition(".")[0]
    if not stem or "__MACOSX" in folder.split("/"):
        return None
    return f"{folder}/{stem}" if folder else stem


def is_json(name: str) -> bool:
    """Whether a member holds a record, by its name."""
    return name.lower().endswith(".json")


def is_caption(name: str) -> bool:
    """Whether a member holds a caption, by its name."""
    return name.lower().endswith(".txt")


def is_medium(name: str) -> bool:
    """Whether a member is an image or audio, by its name."""
    return name.lower().endswith(MEDIA_SUFFIXES)


def sort_media(key: str, names: Iterable[str]) -> list[str]:
    """Return the images or audio of a sample by their numbers, wherever they stand in the archive.

    Names that differ in more than numbers stay together, in the archive's order: left.0, left.1,
    right.0. A name without a number comes before those with one.
    """
    words: dict[str, int] = {}  # a name without its numbers -> its place

    def get_place(name: str) -> tuple[int, list[tuple[int, str]]]:
        rest = posixpath.basename(name)[len(posixpath.basename(key)) :].lower()
        rest = rest[: -len(next(suffix for suffix in MEDIA_SUFFIXES if rest.endswith(suffix)))]
        word = NUMBER.sub("", rest).strip("._- ")
        numbers = [digits.lstrip("0") for digits in NUMBER.findall(rest)]
        return words.setdefault(word, len(words)), [(len(text), text) for text in numbers]

    return sorted(names, key=get_place)


def _decode(text: bytes, what: str) -> str:
    try:
        return text.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        line = text.count(b"\n", 0, error.start) + 1
        raise UserError(f"line {line} of the sample's {what} is not UTF-8 text") from None


def _parse_record(text: bytes) -> dict:
    decoded = _decode(text, ".json")
    try:
        record = parse_json(decoded, start=(1, 1))
    except UserError as error:
        raise UserError(f"the .json of the sample cannot be read: {error}") from None
    if isinstance(record, list):
        record = {"conversations": record}
    if not isinstance(record, dict):
        raise UserError("the .json of a sample holds a record, or the list of its turns")
    return record
