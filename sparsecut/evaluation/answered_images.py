"""What images held when questions about them were answered: no score mixes old and new ones.

images.jsonl in an evaluation's folder has a line for every answered question with images from
files. Images that records hold themselves are named by a hash of their contents anyway.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path

from ..data.errors import RecordError
from ..data.examples import Example
from ..data.file_facts import Facts, describe_image, hold_same_contents
from ..data.jsonl import append_json_lines, read_json_lines, write_json_lines
from ..schema import UserError

IMAGES = "images.jsonl"
NAMES, FACTS = "images", "facts"  # keys of its lines, beside "id"
logger = logging.getLogger(__name__)


class AnsweredImages:
    """The images of an evaluation's answered questions.

    Attributes:
        file: images.jsonl.
        known: From before, (id of a question, names of its images) -> facts of them, once for
            every line.
    """

    def __init__(self, folder: Path, *, is_new: bool = False):
        self.file = folder / IMAGES
        self.known: dict[tuple, list[list[Facts]]] = {}
        self._facts: dict[tuple, Facts] = {}  # (store, name) -> facts of now
        for line in [] if is_new else self._read_lines():
            self.known.setdefault((line["id"], tuple(line[NAMES])), []).append(line[FACTS])

    def _read_lines(self) -> list[dict]:
        if not self.file.is_file():
            return []
        try:
            lines = read_json_lines(self.file, skip_partial=True)
        except RecordError as error:
            raise UserError(f"{error}; start over (--fresh, resume=False)") from None
        for line in lines:
            if not isinstance(line, dict) or not {"id", NAMES, FACTS} <= set(line):
                raise UserError(
                    f"{self.file} holds {str(line)[:40]!r}, which is no line about images; start"
                    " over (--fresh, resume=False)"
                )
        return lines

    def check(self, records: Sequence[dict], examples: Sequence[Example]) -> None:
        """Check that the images of answered questions hold what they held.

        Args:
            records: The questions, some of them answered.
            examples: Their examples.

        Raises:
            UserError: An image has changed since.
        """
        num_unknown = 0
        for record, example in zip(records, examples, strict=True):
            names = _list_files(example)
            if record["prediction"] is None or not names:
                continue
            before = self.known.get((record["id"], tuple(names)))
            if before is None:
                num_unknown += 1
                continue
            now = [self._describe(example, name, before) for name in names]
            if not any(_are_same(now, facts) for facts in before):
                raise self._refuse(names, now, before[0], example)
        if num_unknown:
            logger.warning(
                "%s holds %d answers of a version that did not note what images held, so it is not"
                " known whether images have changed since",
                self.file.parent,
                num_unknown,
            )

    def _refuse(
        self, names: list[str], now: list[Facts], before: list[Facts], example
    ) -> UserError:
        """The error that names the first image that has changed."""
        pairs = zip(names, now, before, strict=True)
        changed = [name for name, new, old in pairs if not hold_same_contents(new, old)]
        return UserError(
            f"the image {changed[0]} in {example.store.path} has changed since {self.file.parent}"
            " got answers about it; put the old image back, give another output folder, or start"
            " over (--fresh, resume=False)"
        )

    def append(self, records: Sequence[dict], examples: Sequence[Example]) -> None:
        """Note the images of questions, just before their answers are written."""
        append_json_lines(self.file, self._make_lines(records, examples))

    def write(self, records: Sequence[dict], examples: Sequence[Example]) -> None:
        """Replace the file by one about the questions that are answered, in their order."""
        write_json_lines(self.file, self._make_lines(records, examples))

    def _make_lines(self, records: Sequence[dict], examples: Sequence[Example]) -> list[dict]:
        lines = []
        for record, example in zip(records, examples, strict=True):
            names = _list_files(example)
            if record["prediction"] is None or not names:
                continue
            before = self.known.get((record["id"], tuple(names)), [])
            facts = [self._describe(example, name, before) for name in names]
            lines.append({"id": record["id"], NAMES: names, FACTS: facts})
        return lines

    def _describe(self, example: Example, name: str, before: list[list[Facts]]) -> Facts:
        """The facts of an image; each file is looked at once."""
        key = str(example.store.path), name
        if key not in self._facts:
            place = _list_files(example).index(name)
            known = before[0][place] if before else None
            self._facts[key] = describe_image(example.store, name, known)
        return self._facts[key]


def _list_files(example: Example) -> list[str]:
    """The names of an example's images, without those that the record holds itself."""
    return [name for name in example.images if isinstance(name, str)]


def _are_same(facts: list[Facts], other: list[Facts]) -> bool:
    return len(facts) == len(other) and all(map(hold_same_contents, facts, other))


def get_view_settings(processor) -> dict:
    """Return what is done to images or audio: settings, or name and hash of a base's processor."""
    from ..prompts import get_medium, get_tokens_per_image  # reading results needs no torch

    if get_medium(processor) == "audio":
        settings = json.dumps(processor.feature_extractor.to_dict(), sort_keys=True)
        return {"settings": hashlib.sha256(settings.encode()).hexdigest()[:16]}
    if get_tokens_per_image(processor) is not None:
        names = ["image_size", "tiles", "coarse", "num_image_tokens"]
        if processor.is_any_size:
            names += ["min_pixels", "max_pixels", "patch_size", "merge_size"]
        return {name: getattr(processor, name) for name in names}
    settings = processor.image_processor.to_dict()
    settings["tokens"] = getattr(processor, "image_seq_length", None)
    text = json.dumps(settings, sort_keys=True, default=str)
    return {
        "processor": type(processor).__name__,
        "settings": hashlib.sha256(text.encode()).hexdigest()[:16],
        "tiles": getattr(processor, "sparsecut_tiles", 0),
    }
